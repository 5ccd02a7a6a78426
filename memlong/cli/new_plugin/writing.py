"""Write the files of a new plugin: all of them, or none."""

from __future__ import annotations

import importlib.metadata
import secrets
import shutil
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from string import Template

from memlong.cli.new_plugin.names import PluginNames
from memlong.errors import InvalidArgumentError

_ENDING = ".template"


def write_plugin(names: PluginNames, folder: Path) -> None:
    """Write a complete plugin package, whose tests pass, into a folder.

    Parameters
    ----------
    names
        Names of the plugin and its parts.
    folder
        Folder for its ``pyproject.toml``, empty or new.

    Raises
    ------
    InvalidArgumentError
        If the folder is not empty, or cannot be written; nothing is left behind.
    """
    target, content = folder.resolve(), _content(names)
    try:
        _refuse_used(folder, target)
        # In or next to the target, so that moving the files is a rename and cannot fail half way on a full disk.
        staging = (target if target.exists() else target.parent) / f".{names.package}-{secrets.token_hex(4)}"
        try:
            for path, text in content.items():
                (staging / path).parent.mkdir(parents=True, exist_ok=True)
                (staging / path).write_text(text, encoding="utf-8")
            _move(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise InvalidArgumentError(
            f"Cannot write {str(folder)!r}: {error.strerror}. Give another folder with --out"
        ) from error


def _refuse_used(folder: Path, target: Path) -> None:
    if not target.parent.is_dir():
        raise InvalidArgumentError(
            f"Cannot write {str(folder)!r}: the folder {str(target.parent)!r} does not exist. Create it first"
        )
    if target.exists() and not target.is_dir():
        raise InvalidArgumentError(f"{str(folder)!r} is not a folder: give another with --out")
    if target.exists() and any(target.iterdir()):
        raise InvalidArgumentError(
            f"{str(folder)!r} is not empty, and nothing is overwritten: give another folder with --out, or remove it "
            "first"
        )


def _content(names: PluginNames) -> dict[PurePosixPath, str]:
    major, minor, *_ = importlib.metadata.version("memlong").split(".")
    known = {
        "backend": names.backend,
        "distribution": names.distribution,
        "package": names.package,
        "index_class": names.index_class,
        "memlong": f">={major}.{minor},<" + (f"0.{int(minor) + 1}" if major == "0" else str(int(major) + 1)),
    }
    return {
        _named(path, names): Template(text).substitute(known)
        for path, text in _templates(files(__package__) / "template", PurePosixPath())
    }


def _templates(folder: Traversable, at: PurePosixPath) -> Iterator[tuple[PurePosixPath, str]]:
    for each in sorted(folder.iterdir(), key=lambda each: each.name):
        if each.is_dir():
            yield from _templates(each, at / each.name)
        elif each.name.endswith(_ENDING):
            yield at / each.name.removesuffix(_ENDING), each.read_text(encoding="utf-8")


def _named(path: PurePosixPath, names: PluginNames) -> PurePosixPath:
    return PurePosixPath(*(names.package if part == "package" else part for part in path.parts))


def _move(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    moved: list[Path] = []
    try:
        for each in list(staging.iterdir()):
            each.rename(target / each.name)
            moved.append(each)
    except BaseException:
        for each in moved:
            (target / each.name).rename(each)
        raise
