"""The command line: one small module a command."""

from memlong.cli.ending import main

__all__ = ["main"]
