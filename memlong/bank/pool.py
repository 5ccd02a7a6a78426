"""BankPool: a bank for each session of a server, idle ones on disk, deleted ones gone."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from memlong.bank.base import MemoryBank
from memlong.bank.sizes import byte_count
from memlong.bank.snapshot.files import unwritable
from memlong.bank.snapshot.manifest import has_manifest
from memlong.bank.snapshot.reader import folder_of
from memlong.errors import InvalidArgumentError

_PREFIX = "session-"
_LONGEST = 1024


@dataclass(eq=False)
class _Session:
    """One session's bank, None while it is on disk, and who may touch it."""

    folder: Path
    bank: MemoryBank | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    users: int = 0


class BankPool:
    """Banks by session, within a budget of bytes for all that are in memory.

    A session has a bank of its own, in a folder of its own, and nothing that one session calls can reach the chunks of
    another: whoever knows a session's id has that session, so ids are to be unguessable, or checked by the server.

    What exceeds the budget is saved, the session that was used longest ago first, and loaded again when it is wanted.
    Banks in use are never spilled: their bytes are over the budget until they are given back. What has not been spilled
    is lost if the process dies, unless `flush` has saved it.

    Parameters
    ----------
    folder : str or Path
        Where idle sessions are kept; sessions of an earlier pool there go on. One pool at a time uses a folder.
    make : callable
        Makes the empty bank of a new session.
    load : callable
        Makes a session's bank of its folder, such as `memlong.load_bank`.
    budget : int or str
        Bytes of embeddings, keys and values in memory, over all sessions, such as "8GB".

    Raises
    ------
    InvalidArgumentError
        If an argument has a value that cannot be used.
    SnapshotError
        If the folder cannot be made.

    Examples
    --------
    >>> pool = BankPool("sessions", lambda: create_bank("faiss", 384), load_bank, budget="8GB")  # doctest: +SKIP
    >>> with pool.session("8f14e45f") as bank:  # doctest: +SKIP
    ...     bank.retrieve(query, k=8)
    """

    def __init__(
        self,
        folder: str | Path,
        make: Callable[[], MemoryBank],
        load: Callable[[Path], MemoryBank],
        *,
        budget: int | str,
    ) -> None:
        self._folder = folder_of(folder)
        self._make, self._load = make, load
        self._budget = byte_count("budget", budget)
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._lock = threading.Lock()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self._folder, error) from error

    @contextmanager
    def session(self, session_id: str) -> Iterator[MemoryBank]:
        """Use a session's bank, in a `with` block; a session that there was not begins with an empty one.

        Several threads may use one session at the same time, as they may use one bank. The bank is not to be kept
        beyond the block.

        Parameters
        ----------
        session_id : str
            Whose bank.

        Raises
        ------
        SnapshotError
            If the session is damaged on disk, or room could not be made for it.
        """
        session = self._enter(session_id)
        try:
            with session.lock:
                if session.bank is None:
                    is_known = has_manifest(session.folder)
                    session.bank = self._load(session.folder) if is_known else self._made()
                bank = session.bank
            yield bank
        finally:
            self._leave(session)
        self._spill(self._budget)

    def delete(self, session_id: str) -> bool:
        """Remove a session with all that it holds, in memory and on disk; whether there was anything.

        Raises
        ------
        InvalidArgumentError
            If the session is in use.
        SnapshotError
            If its files cannot be removed.
        """
        session = self._enter(session_id)
        try:
            with session.lock:  # so that nobody loads or saves it meanwhile
                others = session.users - 1
                if others:
                    raise InvalidArgumentError(
                        f"session {session_id!r} is in use by {others} `with` blocks; delete it when they have ended"
                    )
                there = session.bank is not None or session.folder.exists()
                session.bank = None
                try:
                    if session.folder.exists():
                        shutil.rmtree(session.folder)
                except OSError as error:
                    raise unwritable(session.folder, error) from error
        finally:
            self._leave(session)
        return there

    def flush(self) -> None:
        """Save every session that is in memory, and keep it there; those in use as they are at this moment."""
        for session in self._snapshot():
            with session.lock:
                if session.bank is not None:
                    session.bank.save(session.folder)

    def close(self) -> None:
        """Save every idle session and let go of its memory."""
        self._spill(-1)

    @property
    def nbytes(self) -> int:
        """Bytes of embeddings, keys and values in memory, over all sessions."""
        banks = [session.bank for session in self._snapshot()]
        return sum(bank.nbytes for bank in banks if bank is not None)

    @property
    def in_memory(self) -> int:
        """How many sessions are in memory."""
        return sum(session.bank is not None for session in self._snapshot())

    def __len__(self) -> int:
        with self._lock:
            in_memory = {session.folder.name for session in self._sessions.values()}
            on_disk = {path.name for path in self._folder.iterdir() if path.name.startswith(_PREFIX)}
        return len(in_memory | on_disk)

    def __contains__(self, session_id: str) -> bool:
        with self._lock:
            return session_id in self._sessions or self._folder_of(session_id).exists()

    def _enter(self, session_id: str) -> _Session:
        folder = self._folder_of(session_id)
        with self._lock:
            session = self._sessions.get(session_id)
            if session is None:
                session = self._sessions[session_id] = _Session(folder)
            session.users += 1
            self._sessions.move_to_end(session_id)
            return session

    def _leave(self, session: _Session) -> None:
        with self._lock:
            session.users -= 1
            if not session.users and session.bank is None:
                self._sessions = OrderedDict(
                    (each, other) for each, other in self._sessions.items() if other is not session
                )

    def _made(self) -> MemoryBank:
        bank = self._make()
        if not isinstance(bank, MemoryBank) or len(bank) or bank.next_id:
            raise InvalidArgumentError(
                f"make returned {bank!r}; expected a new, empty bank, or sessions would share one"
            )
        if any(session.bank is bank for session in self._snapshot()):
            raise InvalidArgumentError("make returned the bank of another session; expected a new one")
        return bank

    def _spill(self, budget: int) -> None:
        """Save idle sessions and let go of them, the one used longest ago first, until the rest is within a budget."""
        for session_id, session in self._idle():
            if budget >= 0 and self.nbytes <= budget:
                return
            with session.lock:  # whoever wants the bank from here on waits, and is counted as a user
                if session.bank is None or session.users:
                    continue
                session.bank.save(session.folder)
                with self._lock:
                    if not session.users:
                        session.bank = None
                        self._sessions.pop(session_id, None)

    def _idle(self) -> list[tuple[str, _Session]]:
        with self._lock:
            return [(each, session) for each, session in self._sessions.items() if not session.users]

    def _snapshot(self) -> list[_Session]:
        with self._lock:
            return list(self._sessions.values())

    def _folder_of(self, session_id: str) -> Path:
        if not isinstance(session_id, str) or not session_id or len(session_id) > _LONGEST:
            raise InvalidArgumentError(
                f"session_id is {session_id!r}; expected text of 1 to {_LONGEST} characters"
            )
        digest = hashlib.sha256(session_id.encode("utf-8", "surrogatepass")).hexdigest()
        return (
            self._folder / f"{_PREFIX}{digest}"
        )  # whatever the id is, it names a folder here and nowhere else
