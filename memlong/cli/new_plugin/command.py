"""``memlong plugins new``: a plugin of one's own, complete but for the index."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from memlong.cli.answer import say, shown
from memlong.cli.new_plugin.names import PluginNames
from memlong.cli.new_plugin.writing import write_plugin
from memlong.cli.output import print_section
from memlong.plugins.manager import PluginManager


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the backend, such as my-index.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder to write, empty or new  [default: memlong-NAME]"),
    ] = None,
) -> None:
    """Write a plugin package with a backend of your own.

    It works as it is, with an exact index in NumPy to be replaced, and its tests pass.

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
    say(f"{names.distribution} is written into {shown(str(folder))}")
    print_section(
        "Next",
        [
            f"pip install -e {shlex.quote(f'{plain}[test]')}",
            f"pytest {shlex.quote(plain)}",
            "memlong backends",
        ],
    )
    print_section("Then put your index into", [shown(str(folder / names.package / "index.py"))])
