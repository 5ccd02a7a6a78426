"""What the commands share to print: tables for people, JSON for programs."""

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

from memlong.cli.answer import answer, say, shown
from memlong.cli.files import writable
from memlong.errors import InvalidArgumentError

_RESULTS = (b'{\n  "model":',)  # how the result of a command begins
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
    """Write ``data`` to stdout as one JSON document and nothing else; to stderr, where that fails."""
    text = json.dumps(_in_json(data), indent=2) + "\n"
    try:
        say(text, end="")
    except BrokenPipeError:  # whoever reads has had enough
        raise
    except OSError:
        sys.stderr.write(text)
        raise


class JsonOutput:
    """Where ``--json`` is to go: nowhere, to a file, or to stdout in place of the table.

    Parameters
    ----------
    path
        What the user gave; ``-`` is stdout.

    Raises
    ------
    InvalidArgumentError
        If the file cannot be written, or holds what is no result of a command; better now than after the long work.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._pipe: int | None = None
        if path is not None and path != Path("-"):
            writable(path, replaces=_RESULTS)
            self._pipe = _pipe_at(path)

    @property
    def is_stdout(self) -> bool:
        """Whether stdout is for JSON alone."""
        return self._path == Path("-")

    def write(self, data: Mapping[str, object]) -> bool:
        """Write ``data``, and say whether there is room on stdout for people."""
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
                    f"{str(self._path)!r} cannot be written: {error.strerror}; the result is printed instead"
                ) from error
        return not self.is_stdout


def _in_json(data: object) -> object:
    """Return data with null for numbers that JSON does not have, such as an infinite perplexity."""
    if isinstance(data, Mapping):
        return {name: _in_json(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_in_json(value) for value in data]
    return None if isinstance(data, float) and not isfinite(data) else data


def _pipe_at(path: Path) -> int | None:
    """Open a named pipe, which somebody must be reading; None if it is another kind of file."""
    try:
        if not stat.S_ISFIFO(path.stat().st_mode):
            return None
        number = os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # kept open: or the reader would be at its end
    except FileNotFoundError:
        return None
    except OSError as error:
        why = (
            "is a pipe that nobody reads"
            if error.errno == errno.ENXIO
            else f"cannot be written: {error.strerror}"
        )
        raise InvalidArgumentError(f"{str(path)!r} {why}: start the reader first, or name a file") from error
    os.set_blocking(number, True)
    return number


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of plain text, of very many rows the first; a cell that is a known status is coloured."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(shown(column), overflow="fold")
    for row in rows[:_MOST_ROWS]:
        # As Text: a bracket in a name or a command is no markup.
        table.add_row(*(Text(shown(cell), style=_STYLES.get(cell, "")) for cell in row))
    Console(file=answer()).print(table)
    _count_the_rest(rows)


def print_section(title: str, lines: Sequence[str]) -> None:
    """Print a heading and its lines, never wrapped so that commands can be copied; of very many the first."""
    if not lines:
        return
    console = Console(file=answer(), highlight=False)
    console.print(Text(f"\n{title}", style="bold"))
    for line in lines[:_MOST_ROWS]:
        text = "\n".join(f"  {shown(part)}" for part in line.split("\n"))
        console.print(Text(text), soft_wrap=True)
    _count_the_rest(lines)


def _count_the_rest(rows: Sequence[object]) -> None:
    if len(rows) > _MOST_ROWS:
        say(f"… and {len(rows) - _MOST_ROWS:,} more; --json has them all")
