"""Snapshots: a bank in a folder, from which it can be had again by another process, on another machine."""
