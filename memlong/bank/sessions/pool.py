"""Pool: sessions of a server, idle ones on disk, deleted ones gone."""

from __future__ import annotations

import hashlib
import os
import secrets
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Generic, Self

from memlong.bank.forks import fork_lock, unless_forked
from memlong.bank.sessions.folders import absolute
from memlong.bank.sessions.sessions import (
    Session,
    Sessions,
    Size,
    T,
    Visit,
    folders,
    make_folder,
    most_files,
    raise_all,
    remove,
    save,
)
from memlong.bank.sizes import byte_count
from memlong.bank.snapshot.files import sync_folder, unwritable
from memlong.bank.snapshot.locking import FolderLock
from memlong.bank.snapshot.manifest import has_manifest
from memlong.bank.snapshot.reader import folder_of
from memlong.bank.uncopied import Uncopied
from memlong.bank.warn import warn_caller
from memlong.errors import InvalidArgumentError, MemlongError, SnapshotError

_PREFIX, _DELETED = "session-", "deleted-"
_LONGEST = 1024


class Pool(Uncopied, Generic[T]):
    """Sessions within a budget of bytes for all that are in memory, the others in folders.

    Parameters
    ----------
    folder
        Where idle sessions are kept; sessions of an earlier pool in this folder continue. A pool locks its folder until
        it is closed. A folder that it makes is readable by its user only (mode 0700).
    budget
        Bytes in memory, over all sessions, such as "8GB".

    Raises
    ------
    InvalidArgumentError
        If an argument has a value that cannot be used.
    SnapshotError
        If the folder cannot be made, another pool holds it, or what an earlier one deleted there cannot be removed.
    """

    def __init__(self, folder: str | Path, *, budget: int | str) -> None:
        self._folder = absolute(folder_of(folder))
        self._budget = byte_count("budget", budget)
        self._files = most_files()
        self._sessions: Sessions[T] = Sessions()
        self._lock = fork_lock()
        self._owner = os.getpid()
        make_folder(self._folder)
        held = FolderLock(self._folder)
        held.__enter__()
        self._let_go = weakref.finalize(self, unless_forked(held.__exit__, None, None, None))
        try:
            for path in folders(self._folder, _DELETED):  # a process that died while it deleted them
                remove(path)
        except BaseException:
            self._let_go()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _using(self, session_id: str, open_: Callable[[Path, bool], T]) -> Iterator[T]:
        """Use what a session holds in a `with` block.

        ``open_`` brings it into memory: it gets the session's folder, and whether anything is saved there.
        """
        visit = self._enter(session_id)
        session = visit.session
        try:
            with session.lock:
                if session.held is None:
                    session.held = open_(session.folder, has_manifest(session.folder))
                held = session.held
            self._make_room()
            yield held
        finally:
            self._leave(visit)
            self._make_room()

    def delete(self, session_id: str) -> bool:
        """Remove a session with all it holds, in memory and on disk; return whether there was anything.

        Whenever the process ends, the session is there as a whole or gone; the next pool in this folder removes files
        that are left.

        Raises
        ------
        InvalidArgumentError
            If the session is in use.
        SnapshotError
            If its files cannot be removed, or something else writes into its folder.
        """
        visit = self._enter(session_id)
        session = visit.session
        try:
            with session.lock:  # no one loads or saves it in the meantime
                others = session.users - 1
                if others:
                    raise InvalidArgumentError(
                        f"session {session_id!r} is in use by {others} `with` blocks; delete it when they have ended"
                    )
                there = session.held is not None or session.folder.exists()
                removed = self._set_aside(session.folder) if session.folder.exists() else None
                session.held = None
                if removed is not None:
                    sync_folder(self._folder)  # from here on, the deletion is permanent
                    remove(removed)
        finally:
            self._leave(visit)
        return there

    def flush(self) -> None:
        """Save every session that is in memory, and keep it there; those in use are saved as they are now.

        Raises
        ------
        SnapshotError
            If some could not be saved; all others have been, and the message names each failure.
        """
        self._require_owner()
        failures: list[SnapshotError] = []
        for session in self._snapshot():
            with session.lock:
                failures += save(session)
        raise_all(failures)

    def close(self) -> None:
        """Save every session, free its memory, and unlock the folder, which another pool may use then.

        Raises
        ------
        SnapshotError
            If some could not be saved; they stay in memory, and the pool stays open.
        InvalidArgumentError
            If some are in use; the pool stays open.
        """
        self._require_owner()
        raise_all(self._spill(Size(-1, -1)))
        with self._lock:
            if self._sessions:
                raise InvalidArgumentError(
                    f"{len(self._sessions)} sessions are in use; close the pool when their `with` blocks have ended"
                )
            self._let_go()

    @property
    def nbytes(self) -> int:
        """Bytes in memory, over all sessions."""
        return sum(session.measured().nbytes for session in self._snapshot())

    @property
    def in_memory(self) -> int:
        """How many sessions are in memory."""
        return sum(session.held is not None for session in self._snapshot())

    def __len__(self) -> int:
        with self._lock:
            in_memory = {session.folder.name for session in self._sessions}
            on_disk = {path.name for path in folders(self._folder, _PREFIX)}
        return len(in_memory | on_disk)

    def __contains__(self, session_id: str) -> bool:
        with self._lock:
            return session_id in self._sessions or has_manifest(self._folder_of(session_id))

    def _enter(self, session_id: str) -> Visit[T]:
        self._require_owner()
        folder = self._folder_of(session_id)
        with self._lock:
            if not self._let_go.alive:
                raise MemlongError("The pool is closed: make another one of this folder")
            return self._sessions.enter(session_id, folder)

    def _leave(self, visit: Visit[T]) -> None:
        with self._lock:
            self._sessions.leave(visit)

    def _require_owner(self) -> None:
        if os.getpid() != self._owner:
            raise MemlongError(
                f"The pool was made by process {self._owner}, from which this one was forked: two that save the same "
                "sessions would overwrite each other. Make a pool in this process, in a folder of its own, or start "
                "processes with the method 'spawn'"
            )

    def _set_aside(self, folder: Path) -> Path:
        """Rename a session's folder, in one step, to a name that no session has."""
        aside = self._folder / f"{_DELETED}{secrets.token_hex(16)}"
        with FolderLock(folder):
            pass  # nobody is writing there, and a writer that begins now finds the folder gone
        try:
            folder.rename(aside)
        except OSError as error:
            raise unwritable(folder, error) from error
        return aside

    def _make_room(self) -> None:
        for error in self._spill(Size(self._budget, self._files)):
            warn_caller(
                f"A session could not be saved to make room, and stays in memory: {error}",
                RuntimeWarning,
            )

    def _spill(self, most: Size) -> list[SnapshotError]:
        """Save idle sessions and drop them from memory, least recently used first, until the rest fits.

        Those that cannot be saved stay; returns the errors.
        """
        failures: list[SnapshotError] = []
        tried: set[Session[T]] = set()
        while (session := self._to_spill(most, tried)) is not None:
            tried.add(session)
            with session.lock:  # a thread that wants the bank now waits, and is counted as a user
                if session.held is None or session.users:
                    continue
                held = session.held
                failed = save(session)
                failures += failed
                with self._lock:
                    if not session.users and not failed:
                        self._sessions.forget(session)
                        held.close()  # changes would be lost
        return failures

    def _to_spill(self, most: Size, but: set[Session[T]]) -> Session[T] | None:
        with self._lock:
            return None if self._sessions.size().fits(most) else self._sessions.oldest(but)

    def _snapshot(self) -> list[Session[T]]:
        with self._lock:
            return list(self._sessions)

    def _folder_of(self, session_id: str) -> Path:
        if not isinstance(session_id, str) or not session_id or len(session_id) > _LONGEST:
            raise InvalidArgumentError(
                f"session_id must be text of 1 to {_LONGEST} characters, got {session_id!r}"
            )
        digest = hashlib.sha256(session_id.encode("utf-8", "surrogatepass")).hexdigest()
        return (
            self._folder / f"{_PREFIX}{digest}"
        )  # whatever the id is, it names a folder here and nowhere else
