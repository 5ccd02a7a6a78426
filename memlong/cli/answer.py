"""The answer of a command: standard output is for it alone, whatever plugins and libraries print meanwhile."""

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
    """Have a command print its answer with `say`, and all that others print go to standard error."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        token = _answer.set(sys.stdout)
        try:
            with redirect_stdout(_Aside()):
                command(*arguments, **options)
        except SystemExit as ended:
            # No command of ours ends so, and with status 0 it would look like an answer.
            raise MemlongError(
                f"a plugin or a library ended the program (exit status {ended.code!r}) before there was an answer: "
                "MEMLONG_PLUGINS= leaves all plugins of others out"
            ) from ended
        finally:
            _answer.reset(token)

    return run


def answer() -> TextIO:
    """Return the stream that the answer goes to."""
    return _answer.get() or sys.stdout


def say(text: str, end: str = "\n") -> None:
    """Print a part of the answer."""
    answer().write(text + end)
    answer().flush()


def shown(text: str, keep: str = "") -> str:
    """Return text that may come from a stranger without what would command the terminal, but for what is to be kept."""
    return "".join(each if each.isprintable() or each in keep else repr(each)[1:-1] for each in text)


class _Aside(io.TextIOWrapper):
    """Standard output as others have it while a command runs: text for standard error."""

    def __init__(self) -> None:
        place = open(2, "wb", buffering=0, closefd=False)  # noqa: SIM115 - as long as whoever keeps it
        super().__init__(place, sys.stdout.encoding, "backslashreplace", write_through=True)

    def write(self, text: str) -> int:
        with suppress(OSError):  # nobody is there to read it
            super().write(shown(text, keep="\n\r\t"))
        return len(text)

    def close(self) -> None:
        """Stay open, as the next one may print, too."""
