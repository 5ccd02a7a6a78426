"""The index of a bank: what a backend implements, and what ranks its candidates."""
