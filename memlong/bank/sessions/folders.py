"""Folders that users name."""

from __future__ import annotations

import re
from pathlib import Path

from memlong.errors import InvalidArgumentError
from memlong.uri import without_credentials


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


def not_a_uri(path: str | Path) -> None:
    """Raise InvalidArgumentError for a URI, which would be taken for a folder such as ``s3:``."""
    found = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/|(?i:file):", str(path))
    if found is not None:
        raise InvalidArgumentError(
            f"a folder must be a local path, got the URI {without_credentials(str(path))!r}. (A folder that is named "
            f"like this is ./{found[0]})"
        )


def absolute(folder: str | Path) -> Path:
    """Return a folder's absolute path: a process may change its working directory later.

    Raises
    ------
    InvalidArgumentError
        If it is a URI, or relative to a working directory that is no longer there.
    """
    not_a_uri(folder)
    try:
        return at_home(folder).absolute()
    except OSError as error:
        raise InvalidArgumentError(
            f"{str(folder)!r} is relative, but the working directory cannot be found: {error.strerror}. Give the whole "
            "path"
        ) from error
