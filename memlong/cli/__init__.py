"""The command line: one small module a command."""

from memlong.cli.app import main

__all__ = ["main"]
