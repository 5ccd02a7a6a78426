"""Where keys and values live: in memory, near and far, on disk, in fewer bits."""
