"""memlong: long-term memory for Hugging Face decoder-only models, on the vector index of your choice."""
