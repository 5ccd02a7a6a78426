"""What the commands share to print: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

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


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of plain text; a cell that is a known status is coloured."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # As Text: a bracket in a name or a command is no markup.
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    Console().print(table)


def print_section(title: str, lines: Sequence[str]) -> None:
    """Print a heading and its lines, which are never wrapped so that commands can be copied."""
    if not lines:
        return
    console = Console(highlight=False)
    console.print(Text(f"\n{title}", style="bold"))
    for line in lines:
        console.print(Text(f"  {line}"), soft_wrap=True)
