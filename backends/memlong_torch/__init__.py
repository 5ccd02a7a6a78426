"""memlong_torch."""
