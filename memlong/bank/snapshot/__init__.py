"""Snapshots: a bank in a folder, from which it is created again by another process, on another machine."""
