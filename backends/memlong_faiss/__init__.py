"""memlong_faiss."""
