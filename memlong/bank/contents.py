"""Rows of a table and blocks of a store, which change together or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from weakref import ref

import numpy as np

from memlong.bank.arrays import Ids
from memlong.bank.index.table import ChunkTable, TableRows
from memlong.bank.layout import ChunkLayout
from memlong.bank.store.store import KeyValueStore


@dataclass(frozen=True, eq=False)
class _Before:
    """What there was when a change began, and the ids that it adds."""

    rows: TableRows
    layout: ChunkLayout | None
    added: list[int]


class Contents:
    """A table and a store in step, with the layout of their chunks and the id of the next one.

    An interrupt can come between any two lines, also while a change is undone. So a change first remembers the state
    before it, and one that did not complete is undone at once or, at the latest, before the next use; each step of that
    may be repeated. Rows whose blocks had already left the store go with them.

    Parameters
    ----------
    table : ChunkTable
        Empty.
    store : KeyValueStore
        Empty.
    owner : object
        The owner of the contents; held weakly.
    on_undo : callable
        Tells the owner, before anything else, that the index over the table may be wrong.
    """

    def __init__(
        self, table: ChunkTable, store: KeyValueStore, owner: object, on_undo: Callable[[Any], None]
    ) -> None:
        self._table = table
        self._store = store
        # Weak, or a bank would hold itself, and all that it remembers; no WeakMethod, which swallows an interrupt.
        self._owner: ref[Any] = ref(owner)
        self._on_undo = on_undo
        self._layout: ChunkLayout | None = None
        self._next_id = 0
        self._before: _Before | None = None
        self._strays: list[int] = []

    @property
    def layout(self) -> ChunkLayout | None:
        """Of the chunks held; None where nothing was ever stored."""
        before = self._before
        return self._layout if before is None else before.layout

    @property
    def next_id(self) -> int:
        """The id that the next chunk will get."""
        before = self._before
        undone = before.added if before is not None and before.added else self._strays
        return undone[0] if undone else self._next_id

    @property
    def in_doubt(self) -> bool:
        """Whether a change was cut short, so that `repair` must run before any use."""
        return self._before is not None

    def fill(self, layout: ChunkLayout | None, next_id: int) -> None:
        """Begin with chunks of a layout, the next one to get this id."""
        self._layout = layout
        self._next_id = next_id

    def change(self, layout: ChunkLayout | None, added: Ids | None = None) -> _Change:
        """Complete what is done in the `with` block, or undo it.

        Parameters
        ----------
        layout : ChunkLayout or None
            Layout of the chunks after the change.
        added : numpy.ndarray, optional
            int64 [n], the ids of the chunks that it adds: those from `next_id` on.
        """
        return _Change(self, layout, [] if added is None else added.tolist())

    def repair(self) -> None:
        """Undo a change that was cut short, its blocks included."""
        self.restore()
        if not self._strays:
            return
        left = [chunk_id for chunk_id in self._strays if chunk_id in self._store]
        if left:
            self._store.remove(left)
        self._next_id = self._strays[0]
        self._strays = []

    def restore(self) -> None:
        """Put the table back in step with the store.

        Blocks without a row may stay behind, out of sight: a store that cannot remove them does not keep the bank from
        being read.
        """
        before = self._before
        if before is None:
            return
        owner = self._owner()
        if owner is not None:
            self._on_undo(owner)
        self._table.restore(before.rows)
        held = np.array([chunk_id in self._store for chunk_id in self._table.ids.tolist()], dtype=bool)
        self._table.remove(np.flatnonzero(~held))
        self._layout = before.layout
        self._strays = self._strays or before.added
        self._before = None

    def begin(self, layout: ChunkLayout | None, added: list[int]) -> None:
        """Remember the state before a change."""
        self._before = _Before(self._table.rows, self._layout, added)
        self._layout = layout
        self._next_id += len(added)

    def end(self) -> None:
        """Let a change stand."""
        self._before = None


class _Change:
    """One change; not a generator, which would run on when it is garbage-collected."""

    def __init__(self, contents: Contents, layout: ChunkLayout | None, added: list[int]) -> None:
        self._contents = contents
        self._layout = layout
        self._added = added

    def __enter__(self) -> None:
        self._contents.begin(self._layout, self._added)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._contents.end()
        else:
            self._contents.repair()
