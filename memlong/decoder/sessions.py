"""SessionPool: the conversations of many users with one model, idle ones on disk."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from memlong.bank import MemoryBank
from memlong.bank.sessions.pool import Pool
from memlong.bank.sessions.sessions import Held, Size
from memlong.bank.snapshot.manifest import read_manifest
from memlong.bank.snapshot.reader import is_same_base
from memlong.decoder.decoder import MemoryDecoder
from memlong.decoder.interrupts import uninterrupted
from memlong.decoder.persistence.snapshot import Reading, read_snapshot, write_rows
from memlong.decoder.setup import Setup
from memlong.decoder.stream.banks import check_banks
from memlong.decoder.stream.batch import StreamBatch
from memlong.decoder.stream.rows import RowState, apart, together
from memlong.errors import InvalidArgumentError, MemlongError, OtherBasesError, SnapshotError

_GIVEN_BACK = (
    "The pool has saved this session and dropped it from memory, so changes to its bank here would be lost. Use "
    "`with pool.sessions(...)` again, and the decoder's banks"
)


class HeldStream(Held):
    """A session's stream and bank.

    Attributes
    ----------
    row
        The stream; None while a batch reads it.
    bank
        What it stores into; None for the plain window.
    is_temporary
        Whether nothing of it is to be kept.
    """

    def __init__(
        self, setup: Setup, row: RowState, bank: MemoryBank | None, *, is_temporary: bool = False
    ) -> None:
        self.row: RowState | None = row
        self.bank = bank
        self.is_temporary = is_temporary
        self._setup = setup
        self._saved: RowState | None = None

    @property
    def size(self) -> Size:
        """Bytes of window and bank, without the banks that it lies over; and the bank's open files."""
        row = self.row  # which a batch in another thread may take
        window = Size(0 if row is None else row.nbytes)
        return window if self.bank is None else window + Size(self.bank.resident_bytes, self.bank.open_files)

    @property
    def is_unused(self) -> bool:
        """Whether nothing of it is to be kept: it is temporary, or has read nothing, nor was its bank added to."""
        row = self.row
        if row is None or self.is_temporary:  # without a row, a batch has it: what is on disk is whole
            return True
        return row.is_empty and not (self.bank is not None and self.bank.top.next_id)

    def save(self, folder: Path) -> None:
        """Write what `MemoryDecoder.save` writes of a decoder that reads this stream alone, unless it is there."""
        assert self.row is not None  # noqa: S101 - it is idle, and not unused
        if self._saved is self.row:
            return
        banks = [] if self.bank is None else [self.bank]
        write_rows(folder, self._setup, [self.row.facts], self.row.tensors, banks)
        self._saved = self.row

    def close(self) -> None:
        """Refuse changes to the bank."""
        if self.bank is not None:
            self.bank.refuse_changes(_GIVEN_BACK)


class SessionPool(Pool[HeldStream]):
    """Sessions of one decoder: each has a window, positions and a bank of its own, and any can share a batch.

    Idle sessions take no memory of the model's device. Over the budget, the least recently used ones are saved and
    dropped from memory, and loaded again when needed; the windows of those in a block come on top of it. What has not
    been saved is lost if the process dies, unless `flush` has saved it; a folder always holds a whole earlier state. No
    call on one session reaches another; anyone who knows a session's id can use that session, so make ids unguessable,
    or have the server check them.

    A pool belongs to the process that made it. Any thread may use it; one at a time reads with the decoder, the others
    wait.

    Parameters
    ----------
    decoder : MemoryDecoder
        What reads. Outside of the pool's blocks it can be used for something else, if it is reset afterwards.
    folder : str or Path
        Where idle sessions are kept, each as `MemoryDecoder.save` writes it; sessions of an earlier pool in this folder
        continue. A pool locks its folder until it is closed. A folder that it makes is readable by its user only (mode
        0700).
    budget : int or str
        Bytes of windows and banks in memory, over all sessions, such as "8GB". Neither what an index takes on top, nor
        what a store keeps on disk, nor the bases that sessions share are counted.

    Raises
    ------
    InvalidArgumentError
        If an argument has a value that cannot be used.
    SnapshotError
        If the folder cannot be made, another pool holds it, or what an earlier one deleted there cannot be removed.

    Examples
    --------
    >>> pool = SessionPool(decoder, "sessions", budget="8GB")  # doctest: +SKIP
    >>> with decoder, pool.sessions("8f14e45f", "c9f0f895"):  # doctest: +SKIP
    ...     decoder.generate(prompts, attention_mask, max_new_tokens=50)  # a row for each
    """

    why_uncopied = "it alone holds its folder. Make it in the process that uses it"

    def __init__(self, decoder: MemoryDecoder, folder: str | Path, *, budget: int | str) -> None:
        if not isinstance(decoder, MemoryDecoder):
            raise InvalidArgumentError(f"decoder must be a MemoryDecoder, got {decoder!r}")
        self._decoder = decoder
        self._setup, self._streams = decoder._setup, decoder._streams  # noqa: SLF001 - it continues other streams
        self._turn = threading.Lock()
        self._reader: int | None = None  # the thread whose turn it is
        super().__init__(folder, budget=budget)

    @contextmanager
    def sessions(
        self,
        *session_ids: str,
        bases: Mapping[str, Sequence[MemoryBank]] | None = None,
        temporary: Collection[str] = (),
    ) -> Iterator[MemoryDecoder]:
        """Go on with sessions in a `with` block, each in a row of the decoder; new ones begin with an empty memory.

        If the block ends with an error, they keep what they have read until then.

        Parameters
        ----------
        *session_ids : str
            The sessions, in the order of rows.
        bases : mapping from str to sequences of MemoryBank
            Banks that a session reads and does not change, such as ``load_bank(folder, lazy=True)``; none by default.
            They are the same each time that the session is used.
        temporary : collection of str
            Those of the sessions that begin and end with the block: nothing of them is ever saved. One that is taken
            out of the collection inside the block is kept.

        Yields
        ------
        MemoryDecoder
            The pool's decoder.

        Raises
        ------
        SnapshotError
            If a session is damaged on disk, or was saved with another model or other settings.
        OtherBasesError
            If bases are not those that the session was begun with.
        InvalidArgumentError
            If a session is named twice, bases do not fit the decoder, or a temporary session is there already.
        MemlongError
            If the pool is closed, or the decoder has read something outside of a block and was not reset. Also at the
            end of the block, if the decoder was given other streams or banks there; the sessions then keep what they
            had read.

        Warns
        -----
        RuntimeWarning
            If a session, one of these or another, could not be saved to make room; it stays in memory.
        """
        over = self._checked(session_ids, bases or {}, temporary)
        with self._its_turn(), ExitStack() as visits:
            if self._decoder.tokens_read:
                raise MemlongError(
                    "The decoder has read text that belongs to no session: save() it if it is needed, and reset() the "
                    "decoder before sessions of the pool go on"
                )
            held = [
                visits.enter_context(
                    self._using(
                        name, partial(self._open, name=name, bases=mine, is_temporary=name in temporary)
                    )
                )
                for name, mine in over.items()
            ]
            for each, (name, mine) in zip(held, over.items(), strict=True):
                _check_bases(name, each, mine)
            batch = self._streams.over([each.bank for each in held])
            together([each.row for each in held if each.row is not None], batch)
            self._streams.replace(batch)
            for each in held:
                each.row = None
            try:
                yield self._decoder
            finally:
                with uninterrupted():
                    is_ours = self._reads(held, batch)
                    if is_ours and self._streams.batch is None:  # after flush()
                        batch = self._streams.over([each.bank for each in held])
                    try:
                        for name, each, row in zip(over, held, apart(batch), strict=True):
                            each.is_temporary = name in temporary
                            each.row = row
                    finally:
                        self._streams.reset()
            if not is_ours:
                raise MemlongError(
                    "The decoder was given other streams or banks inside the block, by reset(), restore() or "
                    "use_banks(), and what it has read since is in no session: go on with those that sessions() gives"
                )

    def flush(self) -> None:
        """Save every session that is in memory, and keep it there.

        Raises
        ------
        SnapshotError
            If some could not be saved; all others have been, and the message names each failure.
        MemlongError
            If it is called inside a block of `sessions`.
        """
        with self._its_turn():
            super().flush()

    def _reads(self, held: Sequence[HeldStream], batch: StreamBatch) -> bool:
        """Whether the decoder still reads these streams into these banks, or has flushed them there."""
        tops = [each.bank.top for each in held if each.bank is not None]
        current = self._streams.batch
        is_current = current is batch or (current is None and bool(tops))
        return is_current and [bank.top for bank in self._streams.banks] == tops

    def _checked(
        self,
        session_ids: Sequence[str],
        bases: Mapping[str, Sequence[MemoryBank]],
        temporary: Collection[str],
    ) -> dict[str, tuple[MemoryBank, ...]]:
        if not session_ids or len(set(session_ids)) < len(session_ids):
            raise InvalidArgumentError(
                f"sessions() takes one or more ids, each once, got {', '.join(map(repr, session_ids)) or 'none'}"
            )
        for what, names in (("bases are", bases), ("temporary is", temporary)):
            odd = [name for name in names if name not in session_ids]
            if odd:
                raise InvalidArgumentError(f"{what} given for {odd[0]!r}, which is not one of the sessions")
        there = [name for name in temporary if name in self]
        if there:
            raise InvalidArgumentError(
                f"temporary must name new sessions, got {there[0]!r}, which is there already: delete it first"
            )
        return {name: tuple(bases.get(name, ())) for name in session_ids}

    @contextmanager
    def _its_turn(self) -> Iterator[None]:
        if self._reader == threading.get_ident():
            raise MemlongError(
                "Leave the block of sessions() first: this thread has it open. To serve several sessions at once, name "
                "them together, as in sessions('a', 'b')"
            )
        with self._turn:
            self._reader = threading.get_ident()
            try:
                yield
            finally:
                self._reader = None

    def _open(
        self, folder: Path, is_known: bool, name: str, bases: Sequence[MemoryBank], is_temporary: bool
    ) -> HeldStream:
        if is_known:
            _check_saved_bases(name, folder, bases)
            batch = read_snapshot(folder, self._setup, self._streams, Reading(bases=bases))
        else:
            bank = self._setup.new_bank(bases)
            if bank is not None:
                check_banks([bank], self._setup, any_model=False)
            batch = self._streams.over([bank])
        if len(batch.streams) != 1:
            raise SnapshotError(
                f"{str(folder)!r} must hold one row, got {len(batch.streams)}: something else has written there. Load "
                "it with MemoryDecoder.load, and delete the session"
            )
        (row,) = apart(batch)
        return HeldStream(self._setup, row, next(iter(batch.banks), None), is_temporary=is_temporary)


def _check_bases(name: str, held: HeldStream, bases: Sequence[MemoryBank]) -> None:
    known = () if held.bank is None else held.bank.bases
    if len(known) != len(bases) or any(mine is not theirs for mine, theirs in zip(known, bases, strict=True)):
        raise OtherBasesError(name, [each.identity for each in known])


def _check_saved_bases(name: str, folder: Path, bases: Sequence[MemoryBank]) -> None:
    known = [each for bank in read_manifest(folder).banks for each in bank.bases]
    if len(known) != len(bases) or not all(map(is_same_base, bases, known)):
        raise OtherBasesError(name, [each.identity for each in known])
