"""Writes docs/cli.md from the command-line application itself.

    python docs/_site/commands.py            # after a command or an option has changed

A test checks that the page is up to date.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from memlong.cli.app import make_app

PAGE = Path(__file__).parents[1] / "cli.md"
INTRODUCTION = """\
# Command line

`memlong COMMAND --help` (or `-h`) prints what this page says. Exit codes: 0 success, 1 an error with an explanation,
2 wrong usage, 130 interrupted. Results go to standard output, progress and errors to standard error. `--json` makes a
command's results machine-readable.

This page is generated from the commands themselves by `python docs/_site/commands.py`.
"""


def commands(command: Any, name: str = "memlong") -> Iterator[tuple[str, Any]]:
    """Yield every command below one with what is typed for it: groups first, then what is in them."""
    for word, each in getattr(command, "commands", {}).items():
        yield f"{name} {word}", each
        yield from commands(each, f"{name} {word}")


def page() -> str:
    """Return the page."""
    found = commands(typer.main.get_command(make_app()))
    return INTRODUCTION + "".join(f"\n{section(name, command)}" for name, command in found)


def section(name: str, command: Any) -> str:
    """Return what the page says of one command."""
    prose, examples = said(command.help or "")
    level = "#" * name.count(" ")
    parts = [f"#{level} {name}", *prose]
    if examples:
        parts.append("\n".join(["```bash", *examples, "```"]))
    below = getattr(command, "commands", {})
    if below:
        parts.append("Its commands: " + ", ".join(f"`{name} {word}`" for word in below) + ".")
    rows = [row(parameter) for parameter in command.params if "--help" not in parameter.opts]
    if rows:
        parts.append("\n".join(["| option | default | what it does |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def said(text: str) -> tuple[list[str], list[str]]:
    """Return the paragraphs of a command's help, and its examples."""
    before, _, after = text.replace("\b", "").partition("Examples:\n")
    paragraphs = [re.sub(r"\s+", " ", each).strip() for each in before.split("\n\n")]
    examples = [line.strip() for line in after.splitlines() if line.strip()]
    return [escaped(each) for each in paragraphs if each], examples


def row(parameter: Any) -> str:
    """Return the table's row for an option or an argument."""
    names = [*parameter.opts, *parameter.secondary_opts]
    words = names if parameter.param_type_name == "option" else [str(parameter.metavar or parameter.name)]
    if parameter.param_type_name == "option" and not parameter.is_flag and parameter.metavar:
        words[-1] += f" {parameter.metavar}"
    name = ", ".join(f"`{word}`" for word in words)
    text, _, said_default = (parameter.help or "").removesuffix("]").partition("[default: ")
    return f"| {name} | {escaped(said_default) or default(parameter)} | {escaped(text)} |"


def default(parameter: Any) -> str:
    """Return what happens where an option is left out."""
    if parameter.required:
        return "required"
    if isinstance(parameter.show_default, str):
        return escaped(parameter.show_default)
    value = parameter.default
    if isinstance(value, bool) or (parameter.param_type_name == "option" and parameter.is_flag):
        return "on" if value else "off"
    if value is None or value == () or value == []:
        return ""
    values = value if isinstance(value, list | tuple) else [value]
    return ", ".join(f"`{getattr(each, 'value', each)}`" for each in values)


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is, also in a table."""
    return re.sub(r"([|*<\[])", r"\\\1", re.sub(r"\s+", " ", text).strip())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
