"""Check output files before the long work: they must be writable, and must not overwrite anything else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from memlong.errors import InvalidArgumentError

_HEAD = 4096


def keep_apart(writes: Mapping[str, Path | None], reads: Mapping[str, Iterable[str | Path | None]]) -> None:
    """Check that a command neither overwrites its inputs nor writes a file twice, whatever the names and links.

    Parameters
    ----------
    writes, reads
        The paths given, by option; ``-`` is stdout.

    Raises
    ------
    InvalidArgumentError
        If two options name one file; the message names both.
    """
    used = [(option, Path(each)) for option, given in reads.items() for each in given if each is not None]
    for option, path in writes.items():
        if path is None or path == Path("-"):
            continue
        for other, there in used:
            if _is_one_file(path, there):
                raise InvalidArgumentError(
                    f"{option} and {other} must be different files, got {str(path)!r} for both: it would be "
                    "overwritten"
                )
        used.append((option, path))


def writable(path: Path, *, replaces: tuple[bytes, ...] = (), regular: bool = False) -> Path:
    """Check that a file can be written, before the long work begins.

    Parameters
    ----------
    path
        The file to write.
    replaces
        Only a file that has one of these near its start may be overwritten; by default, any file may.
    regular
        Refuse a device or pipe, which a new file would replace.

    Raises
    ------
    InvalidArgumentError
        If the path is a folder, its folder does not exist, it is not writable, it holds something else, or it is
        not ``regular``.
    """
    try:
        _check_writable(path)
        if regular and path.exists() and not path.is_file():
            raise InvalidArgumentError(f"{str(path)!r} is a device or pipe: name a regular file")
        if replaces and path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                head = file.read(_HEAD)
            if not any(each in head for each in replaces):
                raise InvalidArgumentError(
                    f"{str(path)!r} already exists, and this command did not write it, so it is not overwritten: "
                    "remove it, or name another file"
                )
    except InvalidArgumentError:
        raise
    except (OSError, RuntimeError) as error:  # a name that is too long, a link to itself
        why = getattr(error, "strerror", None) or error
        raise InvalidArgumentError(f"Cannot write {str(path)!r}: {why}") from error
    return path


def save_or_keep(save: Callable[[Path], None], out: Path, what: str) -> None:
    """Save what took long to make to a file, or to a temporary folder if that fails.

    Parameters
    ----------
    save
        Writes it to a path.
    out
        The file.
    what
        What it is, for the message, such as "maps were".

    Raises
    ------
    InvalidArgumentError
        If it is in the temporary folder.
    """
    from safetensors import SafetensorError

    try:
        save(out)
    except (OSError, SafetensorError) as error:
        kept = Path(tempfile.mkdtemp(prefix="memlong-")) / out.name
        save(kept)
        raise InvalidArgumentError(
            f"Cannot write {str(out)!r}: {error}. The {what} saved to {str(kept)!r} instead"
        ) from error


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise InvalidArgumentError(f"{str(path)!r} is a folder: name a file")
    target = path.resolve() if path.is_symlink() else path
    if not target.parent.is_dir():
        raise InvalidArgumentError(
            f"The folder {str(target.parent)!r} for {target.name!r} does not exist: mkdir -p {target.parent}"
        )
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise InvalidArgumentError(
            f"{str(path)!r} is not writable: change its permissions, or name another file"
        )


def _is_one_file(one: Path, other: Path) -> bool:
    try:
        if one.exists() and other.exists():
            return one.is_file() and one.samefile(other)
        return one.resolve() == other.resolve()
    except (OSError, RuntimeError):  # a bad name is reported where it is used
        return False
