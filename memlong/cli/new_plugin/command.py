"""The ``memlong plugins new`` command."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from memlong.cli.answer import escaped, say
from memlong.cli.new_plugin.names import PluginNames
from memlong.cli.new_plugin.writing import write_plugin
from memlong.cli.output import print_section
from memlong.plugins.manager import PluginManager


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the backend, such as my-index.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="New or empty folder to write to  [default: memlong-NAME]"),
    ] = None,
) -> None:
    """Create a plugin package for your own backend.

    It works from the start, with an exact NumPy index for you to replace, and its tests pass.

    \b
    Examples:
      memlong plugins new my-index
      memlong plugins new my-index --out work/my-plugin
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    names = PluginNames(name)
    names.refuse_taken(PluginManager().reports)
    folder = Path(names.distribution) if out is None else out
    write_plugin(names, folder)
    plain = str(folder) if folder.is_absolute() or folder == Path() else f"./{folder}"
    say(f"Created {names.distribution} in {escaped(str(folder))}")
    print_section(
        "Next",
        [
            f"pip install -e {shlex.quote(f'{plain}[test]')}",
            f"pytest {shlex.quote(plain)}",
            "memlong backends",
        ],
    )
    print_section("Then replace the index in", [escaped(str(folder / names.package / "index.py"))])
