"""Sessions of a server: what each holds, in memory or on disk."""
