"""Files of a snapshot: read so that a forged folder does no harm, written so that they survive a power failure."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from memlong.bank.snapshot.hashing import Hashing
from memlong.errors import SnapshotError

_ODD_FLAGS = ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY")  # not every system has all
_FLAGS = sum(getattr(os, flag, 0) for flag in _ODD_FLAGS)
_PIECE = 1 << 20
_LARGE, _DENSEST = 1 << 28, 16


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file.

    Attributes
    ----------
    name : str
        Without a folder.
    nbytes : int
        Its size.
    sha256 : str
        SHA-256 of its content, 64 hexadecimal digits.
    """

    name: str
    nbytes: int
    sha256: str


def damaged(path: Path, why: str) -> SnapshotError:
    """Return the error for a file that differs from what was saved."""
    return SnapshotError(
        f"{str(path)!r} {why}: the snapshot is damaged, and nothing was loaded from it. Get the folder from a copy, or "
        "save into another one"
    )


def unreadable(path: Path, error: OSError) -> SnapshotError:
    """Return the error for a file that cannot be read."""
    return SnapshotError(
        f"{str(path)!r} cannot be read: {error.strerror or error}. Check that the file exists, its permissions and "
        "the disk"
    )


def unwritable(path: Path, error: OSError) -> SnapshotError:
    """Return the error for a file that cannot be written."""
    return SnapshotError(
        f"{str(path)!r} cannot be written: {error.strerror or error}. What was saved there before is as it was. "
        + remedy(error, "Free some space, change the folder's permissions, or name another folder")
    )


def remedy(error: OSError, usual: str) -> str:
    """Return what to do about a folder that cannot be made or written to."""
    is_a_file = isinstance(error, FileExistsError | NotADirectoryError)
    return "This, or a folder it is in, is a file: name a folder" if is_a_file else usual


def followed(path: Path) -> Path:
    """Return the target of a link in the hub's cache, a blob of the same repository; any other path unchanged.

    The cache lays a file out as ``<repository>/snapshots/<revision>/<file>``, a link to ``<repository>/blobs/<hash>``.
    """
    try:
        if path.is_symlink():
            target = path.resolve()
            for folder in path.absolute().parents:
                if folder.name == "snapshots" and target.parent == folder.parent.resolve() / "blobs":
                    return target
    except (OSError, RuntimeError) as error:  # such as a link to itself
        raise damaged(path, f"is a link that leads nowhere ({error})") from error
    return path


def oddity(path: Path) -> str:
    """Return why a path is not a regular file, safe to open; empty if it is, or does not exist."""
    path = followed(path)
    if path.is_symlink():
        return "is a link, which could lead anywhere"
    if path.exists() and not path.is_file():
        return "is not a regular file"
    return "claims to be far larger than what is on the disk" if is_hollow(path) else ""


def is_hollow(*paths: Path) -> bool:
    """Whether large files take hardly any disk space: free for the stranger who made them, gigabytes for the reader.

    Sparse files do, and many hard links to one file.
    """
    size, taken = 0, {}
    for path in paths:
        try:
            found = path.stat()
        except OSError:
            continue
        size += found.st_size
        blocks = getattr(found, "st_blocks", None)  # not every system has it
        place = (found.st_dev, found.st_ino) if found.st_ino else path
        taken[place] = found.st_size if blocks is None else 512 * blocks
    return size > _LARGE and sum(taken.values()) < size // _DENSEST


def open_plain(path: Path) -> FileIO:
    """Open a file for reading; links (except in the hub's cache) and anything but a regular file are refused.

    Raises
    ------
    SnapshotError
        Naming the file.
    """
    path = followed(path)
    try:
        if path.is_symlink():  # where O_NOFOLLOW is missing; where it is there, nobody can be quicker
            raise SnapshotError(
                f"{str(path)!r} is a link, which could lead anywhere: only those of the hub's own cache are followed. "
                "Put the file itself in its place: cp -L"
            )
        file = FileIO(path, opener=lambda name, flags: os.open(name, flags | _FLAGS))
    except SnapshotError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise damaged(path, "is not a regular file")
    return file


class CheckedFile:
    """A file that is read from beginning to end, and only then proven to be the one that was saved.

    What was read is hashed in another thread during the next read, so a buffer must not change until `finish`.

    Parameters
    ----------
    folder : Path
        Folder of the snapshot.
    record : FileRecord
        What the manifest says of it.

    Raises
    ------
    SnapshotError
        If there is no such file, or it has another size.
    """

    def __init__(self, folder: Path, record: FileRecord) -> None:
        self._path = folder / record.name
        self._record = record
        self._file = open_plain(self._path)
        self._hash = Hashing()
        size = os.fstat(self._file.fileno()).st_size
        if size != record.nbytes:
            self._file.close()
            raise damaged(self._path, f"has {size:,} bytes instead of {record.nbytes:,}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hash.end()
        self._file.close()

    def read_into(self, buffer: Any) -> None:
        """Fill a buffer with the next bytes; only `finish` proves them."""
        read_fully(self._file, self._path, buffer)
        self._hash.update(buffer)

    def read(self, count: int) -> bytearray:
        """Return the next bytes, as `read_into`."""
        buffer = bytearray(count)
        self.read_into(buffer)
        return buffer

    def finish(self) -> None:
        """Raise SnapshotError unless everything read is what was saved."""
        if self._hash.hexdigest() != self._record.sha256:
            raise damaged(self._path, "is not what its SHA-256 says")


def read_checked(folder: Path, record: FileRecord) -> bytes:
    """Return a file's content, proven; SnapshotError if it is not what was saved."""
    with CheckedFile(folder, record) as file:
        content = file.read(record.nbytes)
        file.finish()
    return bytes(content)


def check_file(folder: Path, record: FileRecord) -> None:
    """Raise SnapshotError unless a file is what was saved; reads it piece by piece."""
    with CheckedFile(folder, record) as file:
        for start in range(0, record.nbytes, _PIECE):
            file.read(min(_PIECE, record.nbytes - start))
        file.finish()


def read_fully(file: FileIO, path: Path, buffer: Any) -> None:
    """Fill a buffer from the file's position; SnapshotError if the file ends first."""
    rest = memoryview(buffer).cast("B")
    try:
        while rest and (count := file.readinto(rest)):
            rest = rest[count:]
    except OSError as error:
        raise unreadable(path, error) from error
    if rest:
        raise damaged(path, "is too short")


class NewFile:
    """A file that is written once, and is on disk when the `with` block has ended.

    Parameters
    ----------
    path : Path
        Path of a file that does not exist yet.

    Raises
    ------
    SnapshotError
        If it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        self._size = 0
        try:
            self._file = FileIO(path, "x")
        except OSError as error:
            raise unwritable(path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file:
                if kind is None:
                    os.fsync(self._file.fileno())
        except OSError as failure:
            raise unwritable(self._path, failure) from failure

    def write(self, content: Any) -> None:
        """Append bytes."""
        rest = memoryview(content).cast("B")
        self._hash.update(rest)
        self._size += len(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise unwritable(self._path, error) from error

    @property
    def record(self) -> FileRecord:
        """What the manifest says of it."""
        return FileRecord(self._path.name, self._size, self._hash.hexdigest())


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk."""
    if os.name == "nt":  # folders cannot be opened there
        return
    try:
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
    except OSError as error:
        raise unwritable(folder, error) from error
