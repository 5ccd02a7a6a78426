"""Saving: how a bank's state is written into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from memlong.bank.arrays import Ids
from memlong.bank.eviction import saved_name
from memlong.bank.layout import ChunkLayout
from memlong.bank.snapshot.content import Content
from memlong.bank.snapshot.files import FileRecord, unwritable
from memlong.bank.snapshot.manifest import BankRecord, BaseRecord, IndexRecord
from memlong.bank.snapshot.matrix import write_matrix
from memlong.bank.snapshot.options import SavedOptions
from memlong.bank.snapshot.reader import folder_of, layout_record
from memlong.bank.snapshot.segments import SavedBank, StoredSegment, keepable, write_segments
from memlong.bank.snapshot.tensors import encode
from memlong.bank.snapshot.writer import SnapshotWriter
from memlong.bank.state import BankState


class Bank(Protocol):
    """What saving and loading need to know of a `MemoryBank`."""

    maker: ClassVar[type]
    saved_options: ClassVar[SavedOptions]

    def __init__(self, dim: int, **options: Any) -> None: ...

    @property
    def state(self) -> BankState:
        """What it is made of."""

    @property
    def top(self) -> Bank:
        """The bank that changes go to: itself, unless it is layered."""

    @property
    def bases(self) -> Sequence[Bank]:
        """The banks below it."""

    @property
    def among(self) -> Sequence[Ids | None]:
        """For each of those the ids, ascending, of the chunks that can be found there; None for all."""

    @property
    def identity(self) -> str:
        """Which bank it is."""

    def options_to_save(self) -> dict[str, Any]:
        """Return the backend's own options."""

    def fingerprint(self) -> str:
        """Return the SHA-256 of its content."""

    def __len__(self) -> int: ...


def save(bank: Bank, path: str | Path, *, compact: bool) -> None:
    """Write a bank to a folder; see `MemoryBank.save`."""
    with SnapshotWriter(folder_of(path), "bank") as writer:
        saved = write_bank(bank, writer, compact=compact)
        writer.commit([saved.record])
        bank.top.state.saved = saved


def write_bank(
    bank: Bank, writer: SnapshotWriter, *, compact: bool = False, forgets: bool = False, matrix: bool = False
) -> SavedBank:
    """Write what a state of a folder needs of a bank, and return it, for `BankState.saved` once that is current.

    The next save then writes only what has changed since. With ``forgets``, nothing of chunks that have left remains,
    and only what was saved with them is written again. With ``compact`` or ``matrix``, large embeddings are written
    once more, as one matrix. Of a layered bank that is its top, and what its bases are.
    """
    top, among = bank.top, tuple(bank.among)
    bases = tuple(
        BaseRecord(base.identity, base.fingerprint(), len(base), None if each is None else len(each))
        for base, each in zip(bank.bases, among, strict=True)
    )
    with top.state.writing():
        if compact or forgets:
            top.state.drop_index()  # which may remember embeddings of chunks that have left
    return top.state.surviving(
        lambda: _written(
            top, bases, among, writer, compact=compact, forgets=forgets, matrix=matrix or compact
        )
    )


def name_of(maker: type) -> str:
    """Return the name by which a snapshot knows a class."""
    return f"{maker.__module__}:{maker.__qualname__}"


def _written(
    bank: Bank,
    bases: tuple[BaseRecord, ...],
    among: Sequence[Ids | None],
    writer: SnapshotWriter,
    *,
    compact: bool,
    forgets: bool,
    matrix: bool,
) -> SavedBank:
    state = bank.state
    with state.reading(searching=True):
        layout = state.contents.layout
        content = _content(state)
        known = () if compact else _known_to(writer, state.saved)
        kept = keepable(known, content.ids, 0 if layout is None else layout.nbytes)
        if forgets:
            kept = [each for each in kept if np.isin(each.ids, content.ids).all()]
        on_disk = np.concatenate([np.empty(0, dtype=np.int64), *(each.ids for each in kept)])
        fresh = content.rows(~np.isin(content.ids, on_disk))
        written = [] if layout is None else write_segments(writer, fresh, state.store, layout)
        record = replace(
            _record(bank, writer, content, among, layout, [*kept, *written]),
            bases=bases,
            matrix=_matrix(writer, content, state, anew=matrix),
        )
    return SavedBank(writer.token, record, (*kept, *written))


def _matrix(writer: SnapshotWriter, content: Content, state: BankState, *, anew: bool) -> FileRecord | None:
    """Return the file of all embeddings: the one that is there if nothing has changed, or else none, or a new one."""
    known, now = (
        state.saved if _known_to(writer, state.saved) else None,
        (state.contents.next_id, len(content.ids)),
    )
    if known is not None and known.record.matrix and (known.record.next_id, known.record.count) == now:
        return known.record.matrix
    return write_matrix(writer, content.embeddings) if anew else None


def _content(state: BankState) -> Content:
    with state.counting:
        usage = state.table.usage
        retrievals, last_used = usage.retrievals.copy(), usage.last_used.copy()
    return Content(usage.ids.copy(), state.table.embeddings, state.table.spans, retrievals, last_used)


def _known_to(writer: SnapshotWriter, before: SavedBank | None) -> tuple[StoredSegment, ...]:
    """Segments of this very bank that the folder's current state has."""
    if before is None or writer.current is None or writer.current.token != before.token:
        return ()
    for file in (file for each in before.segments for file in (each.record.chunks, each.record.blocks)):
        try:
            if (writer.folder / file.name).lstat().st_size != file.nbytes:
                return ()
        except OSError:
            return ()
    return before.segments


def _record(
    bank: Bank,
    writer: SnapshotWriter,
    content: Content,
    among: Sequence[Ids | None],
    layout: ChunkLayout | None,
    segments: list[StoredSegment],
) -> BankRecord:
    state = bank.state
    counters = {name: getattr(content, name) for name in ("ids", "retrievals", "last_used")}
    counters |= {f"among.{number}": each for number, each in enumerate(among) if each is not None}
    try:
        native = state.index.dump()
    except OSError as error:  # libraries write files of their own, elsewhere
        raise unwritable(writer.folder, error) from error
    return BankRecord(
        identity=state.identity,
        made_by=name_of(bank.maker),
        options=bank.options_to_save(),
        dim=state.dim,
        metric=state.metric,
        max_chunks=state.capacity.max_chunks,
        max_bytes=state.capacity.max_bytes,
        eviction=saved_name(state.capacity.policy),
        device=str(state.device),
        count=len(content.ids),
        next_id=state.contents.next_id,
        clock=state.table.clock,
        layout=layout_record(layout),
        origin=state.origin,
        state=writer.write("state", encode(counters)),
        segments=tuple(each.record for each in segments),
        index=None if native is None else IndexRecord(native[0], writer.write("index", native[1], "bin")),
    )
