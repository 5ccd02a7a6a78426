"""A bank for each session of a server."""
