"""Files that a command is to write: found out now, before the long work, that they can be, and that nothing is lost."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from memlong.errors import InvalidArgumentError

_HEAD = 4096


def keep_apart(writes: Mapping[str, Path | None], reads: Mapping[str, Iterable[str | Path | None]]) -> None:
    """Check that a command writes no file that it reads, and none twice, by whatever name or link.

    Parameters
    ----------
    writes, reads
        By option, what the user gave; ``-`` is no file.

    Raises
    ------
    InvalidArgumentError
        Naming both options.
    """
    used = [(option, Path(each)) for option, given in reads.items() for each in given if each is not None]
    for option, path in writes.items():
        if path is None or path == Path("-"):
            continue
        for other, there in used:
            if _is_one_file(path, there):
                raise InvalidArgumentError(
                    f"{option} and {other} both name {str(path)!r}, which would be overwritten; give each a file of "
                    "its own"
                )
        used.append((option, path))


def writable(path: Path, *, replaces: tuple[bytes, ...] = ()) -> Path:
    """Check, before the long work begins, that a file can be written.

    Parameters
    ----------
    path
        Where.
    replaces
        One of these stands at the beginning of a file that may be overwritten; by default, any file may be.

    Raises
    ------
    InvalidArgumentError
        If its folder does not exist, it is a folder, it may not be written, or it holds something else.
    """
    try:
        _check_writable(path)
        if replaces and path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                head = file.read(_HEAD)
            if not any(each in head for each in replaces):
                raise InvalidArgumentError(
                    f"{str(path)!r} is there already, and not the result of such a command, so it is not overwritten; "
                    "name another file, or remove it"
                )
    except InvalidArgumentError:
        raise
    except (OSError, RuntimeError) as error:  # such as a name that is too long, or a link to itself
        why = getattr(error, "strerror", None) or error
        raise InvalidArgumentError(f"{str(path)!r} cannot be written: {why}") from error
    return path


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise InvalidArgumentError(f"{str(path)!r} is a folder; name a file to write to")
    target = path.resolve() if path.is_symlink() else path
    if not target.parent.is_dir():
        raise InvalidArgumentError(
            f"the folder {str(target.parent)!r} of {target.name!r} does not exist: mkdir -p {target.parent}"
        )
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise InvalidArgumentError(
            f"{str(path)!r} may not be written: name another file, or change its rights"
        )


def _is_one_file(one: Path, other: Path) -> bool:
    try:
        if one.exists() and other.exists():
            return one.is_file() and one.samefile(other)
        return one.resolve() == other.resolve()
    except (OSError, RuntimeError):  # what is wrong with a name is told where it is used
        return False
