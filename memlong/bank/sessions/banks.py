"""BankPool: a bank for each session of a server, idle ones on disk, deleted ones gone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memlong.bank.base import MemoryBank
from memlong.bank.sessions.pool import Pool
from memlong.bank.sessions.sessions import Held, Size
from memlong.bank.warn import warn_caller
from memlong.errors import InvalidArgumentError

_GIVEN_BACK = (
    "The pool has saved this bank and dropped it from memory, so changes to it here would be lost. Use "
    "`with pool.session(...)` again, and the bank that it gives"
)


@dataclass(frozen=True, eq=False)
class HeldBank(Held):
    """A session's bank."""

    bank: MemoryBank

    @property
    def size(self) -> Size:
        """Bytes and files of the bank; of a `LayeredBank`, those of its top."""
        return Size(self.bank.resident_bytes, self.bank.open_files)

    @property
    def is_unused(self) -> bool:
        """Whether nothing was ever added to it."""
        return not self.bank.top.next_id

    def save(self, folder: Path) -> None:
        """Save the bank."""
        self.bank.save(folder)

    def close(self) -> None:
        """Refuse changes to the bank."""
        self.bank.refuse_changes(_GIVEN_BACK)


class BankPool(Pool[HeldBank]):
    """Banks by session, within a budget of bytes for all that are in memory.

    Each session has its own bank in its own folder, and no call on one session reaches the chunks of another. Anyone
    who knows a session's id can use that session, so make ids unguessable, or have the server check them.

    Over the budget, the least recently used sessions are saved and dropped from memory, and loaded again when needed.
    Banks in use are never spilled: their bytes exceed the budget until their `with` block ends. What has not been
    spilled is lost if the process dies, unless `flush` has saved it. A session that cannot be saved stays in memory;
    the others are not affected. A session to which nothing was ever added is dropped at once.

    A pool belongs to the process that made it, and refuses to be used in a fork: a server that forks makes its pool in
    the process that uses the banks.

    Banks that `load` leaves on disk (``lazy=True``) keep files open: sessions are also spilled when these reach half of
    what the system allows.

    Parameters
    ----------
    folder : str or Path
        Where idle sessions are kept; sessions of an earlier pool in this folder continue. A pool locks its folder until
        it is closed. A folder that it makes is readable by its user only (mode 0700).
    make : callable
        Makes the empty bank of a new session.
    load : callable
        Makes a session's bank from its folder, such as `memlong.load_bank`.
    budget : int or str
        Bytes of embeddings, keys and values in memory, over all sessions, such as "8GB". Neither what an
        index takes on top nor what a store keeps on disk is counted.

    Raises
    ------
    InvalidArgumentError
        If an argument has a value that cannot be used.
    SnapshotError
        If the folder cannot be made, another pool holds it, or what an earlier one deleted there cannot be removed.

    Examples
    --------
    >>> pool = BankPool("sessions", lambda: create_bank("faiss", 384), load_bank, budget="8GB")  # doctest: +SKIP
    >>> with pool.session("8f14e45f") as bank:  # doctest: +SKIP
    ...     bank.retrieve(query, k=8)
    """

    why_uncopied = (
        "it alone holds its folder. Make it in the process that uses it; banks of sessions can be copied"
    )

    def __init__(
        self,
        folder: str | Path,
        make: Callable[[], MemoryBank],
        load: Callable[[Path], MemoryBank],
        *,
        budget: int | str,
    ) -> None:
        for name, given in (("make", make), ("load", load)):
            if not callable(given):
                raise InvalidArgumentError(
                    f"{name} must be a function that makes a bank, as in make=lambda: create_bank('faiss', 384), "
                    f"load=load_bank, got {given!r}"
                )
        self._make, self._load = make, load
        self._given: weakref.WeakSet[MemoryBank] = weakref.WeakSet()
        super().__init__(folder, budget=budget)

    @contextmanager
    def session(self, session_id: str) -> Iterator[MemoryBank]:
        """Use a session's bank in a `with` block; a new session begins with an empty one.

        Several threads may use one session at the same time, as they may use one bank. Do not keep the bank
        beyond the block.

        Parameters
        ----------
        session_id : str
            The session's id.

        Raises
        ------
        SnapshotError
            If the session is damaged on disk.
        InvalidArgumentError
            If `make` or `load` did not return a bank of this session alone.
        MemlongError
            If the pool is closed.

        Warns
        -----
        RuntimeWarning
            If a session, this one or another, could not be saved to make room; it stays in memory. Also if a decoder
            has read into the bank what it has not stored yet.
        """
        with self._using(session_id, self._open) as held:
            yield held.bank
            if held.bank.unstored:
                warn_caller(
                    f"A decoder holds {held.bank.unstored} tokens in its window that are not in this session's bank, "
                    "and a pool keeps banks alone: call decoder.flush() before the block ends, or "
                    "generate(remember=False) for what need not be remembered",
                    RuntimeWarning,
                )

    def _open(self, folder: Path, is_known: bool) -> HeldBank:
        bank = self._load(folder) if is_known else self._make()
        name = "load" if is_known else "make"
        if not isinstance(bank, MemoryBank):
            raise InvalidArgumentError(f"{name} must return a MemoryBank, got {bank!r}")
        if not is_known and bank.top.next_id:
            raise InvalidArgumentError(
                f"make must return a new, empty bank, or sessions would share one, got {bank!r}"
            )
        with self._lock:
            if bank in self._given:
                raise InvalidArgumentError(
                    f"{name} must return a new bank each time, got the bank of another session, or one returned before"
                )
            self._given.add(bank)
        return HeldBank(bank)
