"""Objects by name under a place: a local folder, or whatever fsspec reaches."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from memlong.bank.forks import unless_forked
from memlong.errors import InvalidArgumentError, MissingDependencyError, StorageError
from memlong_milvus.uri import redacted


@dataclass(frozen=True)
class Listed:
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
        """Store an object, in place of one of that name; it is there as a whole, or not at all."""

    @abstractmethod
    def read(self, name: str, most: int) -> bytes:
        """Return an object's content; FileNotFoundError where there is none, ValueError if it has more bytes."""

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there count as removed."""

    @abstractmethod
    def list(self, folder: str = "") -> list[Listed]:
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
        """Write beside and rename into place."""
        path = self._folder / name
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            self._write(beside, content)
            beside.replace(path)
            if self._synced:
                _sync_folder(path.parent)
        except OSError as error:
            with suppress(OSError):
                beside.unlink()
            raise StorageError(
                f"{str(path)!r} cannot be written: {error.strerror or error}. Is the disk full, or the folder "
                "another's? store names another place"
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
            raise OSError(f"{str(path)!r} is no plain file")
        with path.open("rb") as file:
            return _bounded(file.read(most + 1), most)

    def delete(self, names: Iterable[str]) -> None:
        """Unlink the files."""
        for name in names:
            with suppress(FileNotFoundError):
                (self._folder / name).unlink()

    def list(self, folder: str = "") -> list[Listed]:
        """Walk the folder."""
        found = []
        for path in (self._folder / folder).rglob("*"):
            with suppress(FileNotFoundError):
                if path.is_file():
                    name = path.relative_to(self._folder).as_posix()
                    found.append(Listed(name, path.stat().st_mtime))
        return found

    def delete_folder(self, folder: str) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder / folder, ignore_errors=True)


class RemoteObjects(Objects):
    """Objects that fsspec reaches: s3://, gcs://, memory:// and the like.

    An object store shows an object when all of it has come; of other kinds of place fsspec promises no such thing, and
    a block that is cut off is found out by its checksum.

    Parameters
    ----------
    uri : str
        The place; fsspec takes credentials from the environment, or from the URI.
    """

    def __init__(self, uri: str) -> None:
        import fsspec

        self.place = redacted(uri)
        try:
            self._files: Any
            self._files, self._root = fsspec.core.url_to_fs(uri)
        except ImportError as error:
            raise MissingDependencyError(
                f"store {self.place!r} needs a library that is not here: {redacted(str(error))}"
            ) from None  # the cause may show the URI as it was given
        except ValueError as error:
            raise InvalidArgumentError(
                f"store {self.place!r} is no place that fsspec knows: {redacted(str(error))}. Expected a folder, or a "
                "URI such as s3://bucket/folder"
            ) from None

    def write(self, name: str, content: bytes) -> None:
        """Send it."""
        self._files.pipe_file(self._path(name), content)

    def read(self, name: str, most: int) -> bytes:
        """Fetch it."""
        return _bounded(self._files.cat_file(self._path(name), start=0, end=most + 1), most)

    def delete(self, names: Iterable[str]) -> None:
        """Remove them, in one request where the place can do that."""
        paths = [self._path(name) for name in names]
        try:
            if paths:
                self._files.rm(paths)
        except FileNotFoundError:
            for path in paths:
                with suppress(FileNotFoundError):
                    self._files.rm_file(path)

    def list(self, folder: str = "") -> list[Listed]:
        """List them, as they are now."""
        self._files.invalidate_cache()
        try:
            found = self._files.find(self._path(folder), detail=True)
        except FileNotFoundError:
            return []
        start = len(self._root.rstrip("/")) + 1
        return [Listed(path[start:], _written(facts)) for path, facts in found.items()]

    def delete_folder(self, folder: str) -> None:
        """Remove it with all that is in it."""
        with suppress(FileNotFoundError):
            self._files.rm(self._path(folder), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")


def _bounded(content: bytes, most: int) -> bytes:
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content


def objects_at(place: str, *, synced: bool = True) -> Objects:
    """Return the objects at a place: a path, file://… or another URI that fsspec knows."""
    if place.startswith("file://"):
        return LocalObjects(Path(place.removeprefix("file://")), synced=synced)
    return RemoteObjects(place) if "://" in place else LocalObjects(Path(place).absolute(), synced=synced)


class TemporaryObjects(LocalObjects):
    """Files in a folder that is made with the first and goes when this does."""

    def __init__(self) -> None:
        folder = Path(tempfile.gettempdir(), f"memlong-milvus-kv-{secrets.token_hex(8)}")
        super().__init__(folder, synced=False)
        weakref.finalize(self, unless_forked(shutil.rmtree, folder, ignore_errors=True))


def _sync_folder(folder: Path) -> None:
    """Have the disk know the names in a folder, where a system lets folders be opened."""
    if os.name == "nt":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _written(facts: dict[str, Any]) -> float:
    for name in ("mtime", "LastModified", "last_modified", "created", "updated"):
        value = facts.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return float("inf")
