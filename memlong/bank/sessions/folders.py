"""Folders that users name."""

from __future__ import annotations

from pathlib import Path

from memlong.errors import InvalidArgumentError


def at_home(path: str | Path) -> Path:
    """Return a path, in which ``~`` is the user's home as it is in a shell.

    Raises
    ------
    InvalidArgumentError
        If the home is unknown.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InvalidArgumentError(
            f"{str(path)!r} is in an unknown home directory. Give the whole path"
        ) from error


def absolute(folder: str | Path) -> Path:
    """Return a folder's absolute path: a process may change its working directory later.

    Raises
    ------
    InvalidArgumentError
        If it is relative to a working directory that is no longer there.
    """
    try:
        return at_home(folder).absolute()
    except OSError as error:
        raise InvalidArgumentError(
            f"{str(folder)!r} is relative, but the working directory cannot be found: {error.strerror}. Give the whole "
            "path"
        ) from error
