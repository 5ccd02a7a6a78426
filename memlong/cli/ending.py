"""How the command begins and ends: an exit status and at most one line, whatever comes in between.

It imports nothing of ours before it is ready for an interrupt, as that takes a while.
"""

from __future__ import annotations

import _thread
import io
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import NoReturn

_FAILED, _INTERRUPTED = 1, 130
_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 an error that is explained, 2 usage, 130 interrupted."""
    before, interrupts = sys.stdout, _Interrupts()
    try:
        status = _run()
        if status and interrupts.came:  # and was made an error of another kind
            status = _INTERRUPTED
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        status = _INTERRUPTED
    except Exception:
        if not interrupts.came:
            raise
        status = _INTERRUPTED
    with suppress(ValueError):  # in another thread than the main one
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while Python ends, one more is to show no traceback
    failure = _failure_to_print()
    if failure is not None:
        status = status or _unprinted(failure)
        _print_nowhere()
    if status == _INTERRUPTED:
        _tell("\nmemlong: interrupted")
    sys.stdout = before or sys.stdout  # so that what others print at the exit is not taken for the answer
    sys.exit(status)


class _Interrupts:
    """Whether one came: libraries make others of it, as transformers a RecursionError while it imports."""

    def __init__(self) -> None:
        self.came = False
        with suppress(ValueError):  # in another thread than the main one
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, self._raise)

    def _raise(self, *_: object) -> None:
        self.came = True
        torch = getattr(sys.modules.get("torch"), "__spec__", None)
        if getattr(torch, "_initializing", False):  # it would abort the process: again when it is imported
            again = threading.Timer(0.05, _thread.interrupt_main)
            again.daemon = True
            again.start()
            return
        raise KeyboardInterrupt


def _run() -> int:
    had_output = sys.stdout is not None
    _open_closed_streams()
    if not had_output:
        _tell(
            "memlong: standard output is closed, so the answer has no place. Use > /dev/null to do without it."
        )
        return _FAILED
    _keep_output_for_the_answer()
    _print_anything()
    from memlong.cli.app import run

    try:
        return run()
    except OSError:
        failure = _failure_to_print("\n")
        if failure is None:
            raise
        return _unprinted(failure)


def _open_closed_streams() -> None:
    """Give closed streams a place: or the next file that is opened is one, and gets what others print."""
    for number, (name, mode) in enumerate(_STREAMS):
        if getattr(sys, name) is None:
            place = os.open(os.devnull, os.O_RDWR)
            if place != number:
                os.dup2(place, number)
                os.close(place)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - as long as the process


def _keep_output_for_the_answer() -> None:
    """Take standard output away from all others: what libraries print, those in C, too, goes to standard error."""
    ours = sys.stdout
    if not isinstance(ours, io.TextIOWrapper):
        return
    try:
        if ours.fileno() != 1:
            return
    except (OSError, ValueError):  # it is no file, as in a test, or closed
        return
    ours.flush()
    place = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = io.TextIOWrapper(
        os.fdopen(place, "wb", 0 if ours.write_through else -1),
        ours.encoding,
        ours.errors,
        line_buffering=ours.line_buffering,
        write_through=ours.write_through,
    )


def _print_anything() -> None:
    """Print what the console has no character for as an escape, instead of failing after the work."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None and sys.stdout.errors in ("strict", "surrogateescape"):
        reconfigure(errors="backslashreplace")


def _failure_to_print(more: str = "") -> OSError | None:
    """Return why what was printed, and a little more, does not reach its place; None if it does."""
    try:
        sys.stdout.write(more)
        sys.stdout.flush()
    except OSError as error:
        return error
    return None


def _unprinted(failure: OSError) -> int:
    if not isinstance(failure, BrokenPipeError):  # else whoever read has had enough
        _tell(f"memlong: the answer cannot be printed: {failure.strerror}. Name a file, or another place.")
    return _FAILED


def _print_nowhere() -> None:
    """Let go of what cannot be printed: Python, too, tries it as it ends, and shows a traceback."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _tell(text: str) -> None:
    with suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
