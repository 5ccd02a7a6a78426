"""Shared output of the commands: tables for people, JSON for programs."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from memlong.cli.answer import answer, escaped, say
from memlong.cli.files import writable
from memlong.errors import InvalidArgumentError

_RESULTS = (b'{\n  "model":',)  # how a command's result starts
_MOST_ROWS = 1_000
_STYLES = {
    "available": "green",
    "loaded": "green",
    "not installed": "yellow",
    "disabled": "yellow",
    "conflict": "red",
    "failed": "red",
    "missing": "red",
}


def print_json(data: Mapping[str, object]) -> None:
    """Write ``data`` to stdout as one JSON document, or to stderr if that fails."""
    text = json.dumps(_in_json(data), indent=2) + "\n"
    try:
        say(text, end="")
    except BrokenPipeError:  # the reader closed the pipe
        raise
    except OSError:
        sys.stderr.write(text)
        raise


class JsonOutput:
    """Where ``--json`` writes: nowhere, to a file, or to stdout instead of the table.

    Parameters
    ----------
    path
        The path given; ``-`` is stdout.

    Raises
    ------
    InvalidArgumentError
        If the file cannot be written, or holds something other than a command's result. Checked before the long work.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._pipe: int | None = None
        if path is not None and path != Path("-"):
            writable(path, replaces=_RESULTS)
            self._pipe = _pipe_at(path)

    @property
    def is_stdout(self) -> bool:
        """Whether stdout is reserved for JSON."""
        return self._path == Path("-")

    def write(self, data: Mapping[str, object]) -> bool:
        """Write ``data``, and return whether stdout is free for a table."""
        if self.is_stdout:
            print_json(data)
        elif self._path is not None:
            try:
                with open(self._path if self._pipe is None else self._pipe, "w", encoding="utf-8") as file:  # noqa: PTH123
                    json.dump(_in_json(data), file, indent=2)
                    file.write("\n")
            except OSError as error:
                print_json(data)
                raise InvalidArgumentError(
                    f"Cannot write {str(self._path)!r}: {error.strerror}. The result is printed instead"
                ) from error
        return not self.is_stdout


def _in_json(data: object) -> object:
    """Replace numbers that JSON lacks, such as an infinite perplexity, with null."""
    if isinstance(data, Mapping):
        return {name: _in_json(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_in_json(value) for value in data]
    return None if isinstance(data, float) and not isfinite(data) else data


def _pipe_at(path: Path) -> int | None:
    """Open a named pipe, which must have a reader; return None for any other file."""
    try:
        if not stat.S_ISFIFO(path.stat().st_mode):
            return None
        number = os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # kept open, or the reader would see end of file
    except FileNotFoundError:
        return None
    except OSError as error:
        why = "it is a pipe without a reader" if error.errno == errno.ENXIO else error.strerror
        raise InvalidArgumentError(
            f"Cannot write {str(path)!r}: {why}. Start the reader first, or name a file"
        ) from error
    os.set_blocking(number, True)
    return number


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, up to a maximum number of rows; cells with a known status are colored."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(escaped(column), overflow="fold")
    for row in rows[:_MOST_ROWS]:
        # As Text, so that brackets in names and commands are not parsed as markup.
        table.add_row(*(Text(escaped(cell), style=_STYLES.get(cell, "")) for cell in row))
    Console(file=answer()).print(table)
    _count_the_rest(rows)


def print_section(title: str, lines: Sequence[str]) -> None:
    """Print a heading and lines, up to a maximum number, unwrapped so that commands can be copied."""
    if not lines:
        return
    console = Console(file=answer(), highlight=False)
    console.print(Text(f"\n{title}", style="bold"))
    for line in lines[:_MOST_ROWS]:
        text = "\n".join(f"  {escaped(part)}" for part in line.split("\n"))
        console.print(Text(text), soft_wrap=True)
    _count_the_rest(lines)


def _count_the_rest(rows: Sequence[object]) -> None:
    if len(rows) > _MOST_ROWS:
        say(f"… and {len(rows) - _MOST_ROWS:,} more; --json prints all")
