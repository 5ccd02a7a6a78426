"""The lock of a folder: one process writes at a time, and a process that died holds nothing."""

from __future__ import annotations

import os
import sys
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from memlong.bank.snapshot.files import unwritable
from memlong.errors import SnapshotError

LOCK = "lock"


class FolderLock:
    """Hold a folder alone, in a `with` block.

    The system itself holds the lock, on a file that names its owner, and lets go of it when the process ends, however
    that comes about. So a file that a dead process has left behind locks nothing. A process that is forked meanwhile
    does not hold it.

    Parameters
    ----------
    folder : Path
        It must exist.

    Raises
    ------
    SnapshotError
        On entering, if another process or thread holds the folder, or nothing can be written there.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._number = -1
        _locks.add(self)

    def __enter__(self) -> Self:
        try:
            while not self._is_ours():
                self.let_go()
                flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
                self._number = os.open(self._path, flags, 0o666)
                if not _try_lock(self._number):
                    raise self._held_by_another()
            os.ftruncate(self._number, 0)
            os.write(self._number, f"{os.getpid()}\n".encode())
        except SnapshotError:
            self.let_go()
            raise
        except OSError as error:
            self.let_go()
            raise unwritable(self._path, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._number >= 0:
            with suppress(OSError):
                self._path.unlink()  # while it is held, so that nobody else's goes
        self.let_go()

    def _is_ours(self) -> bool:
        """Whether the file that is locked still is the one of that name; its owner before may have removed it."""
        if self._number < 0:
            return False
        try:
            return os.path.samestat(os.fstat(self._number), os.stat(self._path, follow_symlinks=False))  # noqa: PTH116
        except FileNotFoundError:
            return False

    def let_go(self) -> None:
        """Close the file, which is to hold the lock no longer in this process."""
        if self._number >= 0:
            os.close(self._number)
        self._number = -1

    def _held_by_another(self) -> SnapshotError:
        owner = os.read(self._number, 20).decode(errors="replace").strip()
        return SnapshotError(
            f"{str(self._path)!r} is held by {f'process {owner}' if owner else 'another process'}, which writes into "
            "this folder: two writers would overwrite each other. Wait until it is done, or name another folder."
        )


_locks: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _let_go_of_all() -> None:
    for lock in list(_locks):
        lock.let_go()


if hasattr(os, "register_at_fork"):  # or a lock would last as long as a child of its owner
    os.register_at_fork(after_in_child=_let_go_of_all)


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
