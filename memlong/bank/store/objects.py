"""Objects by name in a place: a local folder, or any place that fsspec supports."""

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
    """An entry of a listing.

    Attributes
    ----------
    name : str
        Name relative to the place, with "/" between its parts.
    written : float
        When it was written, in seconds since 1970; infinity if unknown.
    """

    name: str
    written: float


class Objects(ABC):
    """Bytes by name, each object written atomically; names have "/" between their parts."""

    place: str
    """The place, without secrets."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Store an object, replacing any of that name; it is stored completely or not at all."""

    @abstractmethod
    def read(self, name: str, most: int) -> bytes:
        """Return an object's content; FileNotFoundError if it is missing, ValueError if it exceeds ``most`` bytes."""

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; missing ones are ignored."""

    @abstractmethod
    def list(self, folder: str = "") -> list[StoredObject]:
        """Return all objects in a folder and its subfolders, in no particular order."""

    @abstractmethod
    def delete_folder(self, folder: str) -> None:
        """Remove all objects in a folder and its subfolders."""


class LocalObjects(Objects):
    """Files in a local folder.

    Parameters
    ----------
    folder : Path
        Created when the first object is written.
    synced : bool, default True
        Whether `write` waits until the object is on the disk (fsync).
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
                + remedy(error, "Free some space, change the folder's permissions, or name another place")
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
    """Objects in a place that fsspec supports: s3://, gcs://, memory:// and others.

    Object stores write atomically. For other places fsspec does not guarantee that; a truncated block is found by its
    checksum.

    Parameters
    ----------
    uri : str
        URI of the place; credentials come from the environment or the URI, as usual with fsspec.
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
            ) from None  # the cause may show the URI with its credentials
        except ValueError as error:
            raise InvalidArgumentError(
                f"The place must be a folder, or a URI that fsspec knows, such as s3://bucket/folder, got "
                f"{self.place!r}: {without_credentials(str(error))}"
            ) from None
        except Exception as error:  # noqa: BLE001 - any library behind fsspec
            raise self._failed(error) from None

    def write(self, name: str, content: bytes) -> None:
        """Upload the object."""
        path = self._path(name)
        try:
            self._ask(self._files.pipe_file, path, content)
        except FileNotFoundError:  # a filesystem with real folders
            self._ask(self._files.makedirs, path.rpartition("/")[0], exist_ok=True)
            self._ask(self._files.pipe_file, path, content)

    def read(self, name: str, most: int) -> bytes:
        """Download the object."""
        return _bounded(self._ask(self._files.cat_file, self._path(name), start=0, end=most + 1), most)

    def delete(self, names: Iterable[str]) -> None:
        """Remove the objects, in one request if supported."""
        paths = [self._path(name) for name in names]
        try:
            if paths:
                self._ask(self._files.rm, paths)
        except FileNotFoundError:
            for path in paths:
                with suppress(FileNotFoundError):
                    self._ask(self._files.rm_file, path)

    def list(self, folder: str = "") -> list[StoredObject]:
        """List the objects, bypassing fsspec's cache."""
        self._files.invalidate_cache()
        try:
            found = self._ask(self._files.find, self._path(folder), detail=True)
        except FileNotFoundError:
            return []
        start = len(self._root.rstrip("/")) + 1
        return [StoredObject(path[start:], _written(facts)) for path, facts in found.items()]

    def delete_folder(self, folder: str) -> None:
        """Remove the folder and everything in it."""
        with suppress(FileNotFoundError):
            self._ask(self._files.rm, self._path(folder), recursive=True)

    def _ask(self, act: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Call fsspec; errors of the libraries behind it become OSErrors that show no credentials."""
        try:
            return act(*given, **named)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - any library behind fsspec
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> StorageError:
        return StorageError(
            f"{self.place!r} cannot be used: {without_credentials(f'{type(error).__name__}: {error}')}. Check the "
            "place and the credentials for it, or name another"
        )

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")


def objects_at(place: str | Path, *, synced: bool = True) -> Objects:
    """Open a place for objects.

    Parameters
    ----------
    place : str or Path
        A folder, or a URI that fsspec knows, such as file:///folder or s3://bucket/folder.
    synced : bool, default True
        Whether writing to a local folder waits until the object is on the disk (fsync).

    Raises
    ------
    InvalidArgumentError
        If it is none of these, or fsspec does not know the place.
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
