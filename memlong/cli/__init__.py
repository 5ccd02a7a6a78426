"""The command line, one small module per command."""

from memlong.cli.ending import main

__all__ = ["main"]
