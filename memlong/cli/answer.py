"""The output of a command: stdout carries nothing else, whatever plugins and libraries print meanwhile."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from contextvars import ContextVar
from functools import wraps
from typing import Any, TextIO

from memlong.errors import MemlongError

_answer: ContextVar[TextIO | None] = ContextVar("answer", default=None)


def answering(command: Callable[..., None]) -> Callable[..., None]:
    """Reserve stdout for what a command prints with `say`, and send everything else to stderr."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        token = _answer.set(sys.stdout)
        try:
            with redirect_stdout(_Aside()):
                command(*arguments, **options)
        except SystemExit as ended:
            # None of our commands exits this way, and exit status 0 would look like success.
            raise MemlongError(
                f"A plugin or library exited the program (exit status {ended.code!r}) before the command finished. "
                "To run without third-party plugins, set MEMLONG_PLUGINS= (empty)"
            ) from ended
        finally:
            _answer.reset(token)

    return run


def answer() -> TextIO:
    """Return the stream that output goes to."""
    return _answer.get() or sys.stdout


def say(text: str, end: str = "\n") -> None:
    """Print part of the command's output."""
    answer().write(text + end)
    answer().flush()


def escaped(text: str, keep: str = "") -> str:
    """Escape control characters in untrusted text, so that it cannot drive the terminal; ``keep`` lists exceptions."""
    return "".join(each if each.isprintable() or each in keep else repr(each)[1:-1] for each in text)


class _Aside(io.TextIOWrapper):
    """What replaces ``sys.stdout`` while a command runs: it writes to stderr."""

    def __init__(self) -> None:
        place = open(2, "wb", buffering=0, closefd=False)  # noqa: SIM115 - libraries may keep it
        super().__init__(place, sys.stdout.encoding, "backslashreplace", write_through=True)

    def write(self, text: str) -> int:
        with suppress(OSError):  # stderr is closed
            super().write(escaped(text, keep="\n\r\t"))
        return len(text)

    def close(self) -> None:
        """Stay open: others may still print."""
