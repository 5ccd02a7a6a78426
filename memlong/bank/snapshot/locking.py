"""The lock of a folder: one process writes at a time, and a dead process holds nothing."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from memlong.bank.forks import tell_after_fork
from memlong.bank.snapshot.files import unwritable
from memlong.errors import SnapshotError

LOCK = "lock"


class FolderLock:
    """Hold a folder alone, in a `with` block.

    The operating system holds the lock, on a file that names its owner, and releases it when the process ends in any
    way, so a file left by a dead process locks nothing. A forked child does not hold it.

    Parameters
    ----------
    folder : Path
        It must exist.
    name : str
        Name of the file in it that is locked.

    Raises
    ------
    SnapshotError
        On entering, if another process or thread holds the folder, or nothing can be written there.
    """

    def __init__(self, folder: Path, name: str = LOCK) -> None:
        self._path = folder / name
        self._file: FileIO | None = None  # closed with this object, whatever an interrupt leaves undone
        tell_after_fork(self)

    def __enter__(self) -> Self:
        try:
            self._lock()
            os.ftruncate(self._number, 0)
            os.write(self._number, f"{os.getpid()}\n".encode())
        except OSError as error:
            self.let_go()
            if isinstance(error, SnapshotError):
                raise
            raise unwritable(self._path, error) from error
        except BaseException:
            self.let_go()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._path.unlink()  # while it is held, so that it is not another's
        self.let_go()

    def let_go(self) -> None:
        """Unlock the file, even if a child that is just being forked has it open, too."""
        file, self._file = self._file, None
        if file is not None:
            with file:
                _unlock(file.fileno())

    def after_fork(self) -> None:
        """Close the parent's file: otherwise the lock would last as long as the child."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _lock(self) -> None:
        """Lock without waiting, except for a lock that an interrupted writer of this process left to be collected."""
        tries = 0
        while not self._is_ours():
            self.let_go()
            self._file = FileIO(self._path, "r+", opener=_opened)
            if not _try_lock(self._number):
                owner = os.read(self._number, 20).decode(errors="replace").strip()
                tries += 1
                if owner != str(os.getpid()) or tries > 1:
                    raise self._held_by(owner)
                self.after_fork()  # closes it; there is nothing to unlock
                gc.collect()

    @property
    def _number(self) -> int:
        return -1 if self._file is None else self._file.fileno()

    def _is_ours(self) -> bool:
        """Whether the locked file still has its name; its previous owner may have removed it."""
        if self._file is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._number), os.stat(self._path, follow_symlinks=False))  # noqa: PTH116
        except FileNotFoundError:
            return False

    def _held_by(self, owner: str) -> SnapshotError:
        return SnapshotError(
            f"{str(self._path)!r} is held by {f'process {owner}' if owner else 'another process'}, which writes into "
            "this folder: two writers would overwrite each other. Wait until it is done, or name another folder"
        )


def _opened(name: str, flags: int) -> int:
    flags |= os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    return os.open(name, flags, 0o666)


def _try_lock(number: int) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(number: int) -> None:
    if sys.platform != "win32":  # there, closing does it, and no other process has it open
        import fcntl

        with suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_UN)
