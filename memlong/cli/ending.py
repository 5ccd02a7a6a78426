"""Start and end the command: an exit status and at most one line on stderr, whatever happens in between.

It handles interrupts before it imports the rest of memlong, which takes a while.
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
    """Run the command line and exit: 0 success, 1 error (with a message), 2 usage error, 130 interrupted."""
    before, interrupts = sys.stdout, _Interrupts()
    try:
        status = _run()
        if status and interrupts.came:  # a library turned it into another error
            status = _INTERRUPTED
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        status = _INTERRUPTED
    except Exception:
        if not interrupts.came:
            raise
        status = _INTERRUPTED
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for an interrupt during shutdown
    failure = _failure_to_print()
    if failure is not None:
        status = status or _unprinted(failure)
        _print_nowhere()
    if status == _INTERRUPTED:
        _print_error("\nmemlong: interrupted")
    sys.stdout = before or sys.stdout  # exit handlers must not print into the command's output
    sys.exit(status)


class _Interrupts:
    """Remembers whether an interrupt came: libraries may turn it into another error (transformers: RecursionError)."""

    def __init__(self) -> None:
        self.came = False
        with suppress(ValueError):  # not in the main thread
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, self._raise)

    def _raise(self, *_: object) -> None:
        self.came = True
        torch = getattr(sys.modules.get("torch"), "__spec__", None)
        if getattr(torch, "_initializing", False):  # it would abort the process: retry after the import
            again = threading.Timer(0.05, _thread.interrupt_main)
            again.daemon = True
            again.start()
            return
        raise KeyboardInterrupt


def _run() -> int:
    had_output = sys.stdout is not None
    _open_closed_streams()
    if not had_output:
        _print_error(
            "memlong: Standard output is closed, so the result cannot be printed. To discard it, use > /dev/null"
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
    """Point closed standard streams at /dev/null: otherwise the next opened file takes their number, and the output."""
    for number, (name, mode) in enumerate(_STREAMS):
        if getattr(sys, name) is None:
            place = os.open(os.devnull, os.O_RDWR)
            if place != number:
                os.dup2(place, number)
                os.close(place)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - lives as long as the process


def _keep_output_for_the_answer() -> None:
    """Redirect what libraries print, C libraries included, from stdout to stderr."""
    ours = sys.stdout
    if not isinstance(ours, io.TextIOWrapper):
        return
    try:
        if ours.fileno() != 1:
            return
    except (OSError, ValueError):  # not a real file, as in tests, or closed
        return
    ours.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = io.TextIOWrapper(
        os.fdopen(output, "wb", 0 if ours.write_through else -1),
        ours.encoding,
        ours.errors,
        line_buffering=ours.line_buffering,
        write_through=ours.write_through,
    )


def _print_anything() -> None:
    """Print characters that the console lacks as escapes, instead of failing once the work is done."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None and sys.stdout.errors in ("strict", "surrogateescape"):
        reconfigure(errors="backslashreplace")


def _failure_to_print(more: str = "") -> OSError | None:
    """Flush stdout, after writing ``more``, and return the error if that fails."""
    try:
        sys.stdout.write(more)
        sys.stdout.flush()
    except OSError as error:
        return error
    return None


def _unprinted(failure: OSError) -> int:
    if not isinstance(failure, BrokenPipeError):  # a reader that stops early, such as head, is not an error
        _print_error(f"memlong: Cannot print the result: {failure.strerror}. Redirect the output elsewhere")
    return _FAILED


def _print_nowhere() -> None:
    """Discard what could not be printed: Python would retry at exit and show a traceback."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _print_error(text: str) -> None:
    with suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
