"""Keys and values: the local window as a cache, and what is stored of a chunk."""
