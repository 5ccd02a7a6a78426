"""memlong_hnswlib."""
