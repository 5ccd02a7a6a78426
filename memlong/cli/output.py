"""What the commands share to print: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from memlong.cli.values import writable
from memlong.errors import InvalidArgumentError

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
    """Write ``data`` to stdout as one JSON document and nothing else."""
    json.dump(data, sys.stdout, indent=2)
    sys.stdout.write("\n")


class JsonOutput:
    """Where ``--json`` is to go: nowhere, to a file, or to stdout in place of the table.

    Parameters
    ----------
    path
        What the user gave; ``-`` is stdout.

    Raises
    ------
    InvalidArgumentError
        If the file cannot be written; better now than after the long work.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None and path != Path("-"):
            writable(path)

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
                self._path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                print_json(data)
                raise InvalidArgumentError(
                    f"{str(self._path)!r} cannot be written: {error.strerror}; the result is printed instead"
                ) from error
        return not self.is_stdout


def shown(text: str) -> str:
    """Return text that may come from a stranger without what would command the terminal."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of plain text; a cell that is a known status is coloured."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(shown(column), overflow="fold")
    for row in rows:
        # As Text: a bracket in a name or a command is no markup.
        table.add_row(*(Text(shown(cell), style=_STYLES.get(cell, "")) for cell in row))
    Console().print(table)


def print_section(title: str, lines: Sequence[str]) -> None:
    """Print a heading and its lines, which are never wrapped so that commands can be copied."""
    if not lines:
        return
    console = Console(highlight=False)
    console.print(Text(f"\n{title}", style="bold"))
    for line in lines:
        text = "\n".join(f"  {shown(part)}" for part in line.split("\n"))
        console.print(Text(text), soft_wrap=True)
