"""Objects by name under a place: a local folder, or what fsspec reaches."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from memlong.bank.sessions.folders import absolute
from memlong.bank.snapshot.files import remedy, sync_folder
from memlong.errors import InvalidArgumentError, MissingDependencyError, StorageError
from memlong.uri import local_path, without_credentials


@dataclass(frozen=True)
class StoredObject:
    """An object as a listing shows it.

    Attributes
    ----------
    name : str
        Below the place, with "/" between its parts.
    written : float
        When, in seconds since 1970; infinity where that cannot be told.
    """

    name: str
    written: float


class Objects(ABC):
    """Bytes by name, each written as a whole; names have "/" between their parts."""

    place: str
    """Where they are, without secrets."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Store an object, replacing one of that name; it is there as a whole, or not at all."""

    @abstractmethod
    def read(self, name: str, most: int) -> bytes:
        """Return an object's content; FileNotFoundError where there is none, ValueError if it has more bytes."""

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there count as removed."""

    @abstractmethod
    def list(self, folder: str = "") -> list[StoredObject]:
        """Return all objects below a folder, in no particular order."""

    @abstractmethod
    def delete_folder(self, folder: str) -> None:
        """Remove all objects below a folder."""


class LocalObjects(Objects):
    """Files in a local folder.

    Parameters
    ----------
    folder : Path
        Made when the first object is written.
    synced : bool, default True
        Whether an object is on the disk, and not only in its cache, before `write` returns.
    """

    def __init__(self, folder: Path, *, synced: bool = True) -> None:
        self.place = str(folder)
        self._folder, self._synced = folder, synced

    def write(self, name: str, content: bytes) -> None:
        """Write a temporary file and rename it into place."""
        path = self._folder / name
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            self._write(part, content)
            part.replace(path)
            if self._synced:
                sync_folder(path.parent)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise StorageError(
                f"{str(path)!r} cannot be written: {error.strerror or error}. "
                + remedy(error, "Free some space, change the folder's rights, or name another place.")
            ) from error

    def _write(self, path: Path, content: bytes) -> None:
        try:
            file = path.open("wb")
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb")
        with file:
            file.write(content)
            if self._synced:
                file.flush()
                os.fsync(file.fileno())

    def read(self, name: str, most: int) -> bytes:
        """Read the file."""
        path = self._folder / name
        if path.exists() and not path.is_file():
            raise OSError(f"{str(path)!r} is not a regular file")
        with path.open("rb") as file:
            return _bounded(file.read(most + 1), most)

    def delete(self, names: Iterable[str]) -> None:
        """Unlink the files."""
        for name in names:
            with suppress(FileNotFoundError):
                (self._folder / name).unlink()

    def list(self, folder: str = "") -> list[StoredObject]:
        """Walk the folder."""
        found = []
        for path in (self._folder / folder).rglob("*"):
            with suppress(FileNotFoundError):
                if path.is_file():
                    name = path.relative_to(self._folder).as_posix()
                    found.append(StoredObject(name, path.stat().st_mtime))
        return found

    def delete_folder(self, folder: str) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder / folder, ignore_errors=True)


class RemoteObjects(Objects):
    """Objects that fsspec reaches: s3://, gcs://, memory:// and the like.

    An object store shows an object once all of it has arrived. Of other places fsspec promises no such thing; a block
    that is cut off is found by its checksum.

    Parameters
    ----------
    uri : str
        The place; fsspec takes credentials from the environment, or from the URI.
    """

    def __init__(self, uri: str) -> None:
        self.place = without_credentials(uri)
        try:
            import fsspec
        except ImportError as error:
            raise MissingDependencyError(
                f"Keys and values at {self.place!r} need fsspec: pip install 'memlong[objects]', and the package for "
                "that place, such as s3fs. (A local folder needs neither.)"
            ) from error
        try:
            self._files: Any
            self._files, self._root = fsspec.core.url_to_fs(uri)
        except ImportError as error:
            raise MissingDependencyError(
                f"{self.place!r} needs a library that is not installed: {without_credentials(str(error))}"
            ) from None  # the cause may show the URI as it was given
        except ValueError as error:
            raise InvalidArgumentError(
                f"The place must be a folder, or a URI that fsspec knows, such as s3://bucket/folder, got "
                f"{self.place!r}: {without_credentials(str(error))}."
            ) from None
        except Exception as error:  # noqa: BLE001 - of any library behind fsspec
            raise self._failed(error) from None

    def write(self, name: str, content: bytes) -> None:
        """Send it."""
        path = self._path(name)
        try:
            self._ask(self._files.pipe_file, path, content)
        except FileNotFoundError:  # a filesystem with folders
            self._ask(self._files.makedirs, path.rpartition("/")[0], exist_ok=True)
            self._ask(self._files.pipe_file, path, content)

    def read(self, name: str, most: int) -> bytes:
        """Fetch it."""
        return _bounded(self._ask(self._files.cat_file, self._path(name), start=0, end=most + 1), most)

    def delete(self, names: Iterable[str]) -> None:
        """Remove them, in one request where the place can do that."""
        paths = [self._path(name) for name in names]
        try:
            if paths:
                self._ask(self._files.rm, paths)
        except FileNotFoundError:
            for path in paths:
                with suppress(FileNotFoundError):
                    self._ask(self._files.rm_file, path)

    def list(self, folder: str = "") -> list[StoredObject]:
        """List them, as they are now."""
        self._files.invalidate_cache()
        try:
            found = self._ask(self._files.find, self._path(folder), detail=True)
        except FileNotFoundError:
            return []
        start = len(self._root.rstrip("/")) + 1
        return [StoredObject(path[start:], _written(facts)) for path, facts in found.items()]

    def delete_folder(self, folder: str) -> None:
        """Remove it with all that is in it."""
        with suppress(FileNotFoundError):
            self._ask(self._files.rm, self._path(folder), recursive=True)

    def _ask(self, act: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Call fsspec; whatever a library behind it raises is an OSError, and shows no credentials."""
        try:
            return act(*given, **named)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - of any library behind fsspec
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> StorageError:
        return StorageError(
            f"{self.place!r} cannot be used: {without_credentials(f'{type(error).__name__}: {error}')}. Check the "
            "place and the credentials for it, or name another."
        )

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")


def objects_at(place: str | Path, *, synced: bool = True) -> Objects:
    """Return the objects at a place.

    Parameters
    ----------
    place : str or Path
        A folder, file://... or another URI that fsspec knows, such as s3://bucket/folder.
    synced : bool, default True
        Whether objects in a local folder are on the disk, and not only in its cache, once they are written.

    Raises
    ------
    InvalidArgumentError
        If it is none of these, or fsspec knows no such place.
    MissingDependencyError
        If fsspec, or the library that it needs for this place, is not installed.
    """
    folder = local_path(str(place))
    if folder is None:
        scheme, colon, rest = str(place).partition("://")
        return RemoteObjects(scheme.lower() + colon + rest)
    return LocalObjects(absolute(folder), synced=synced)


def _bounded(content: bytes, most: int) -> bytes:
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content


def _written(facts: dict[str, Any]) -> float:
    for name in ("mtime", "LastModified", "last_modified", "created", "updated"):
        value = facts.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return float("inf")
