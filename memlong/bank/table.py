"""The bank's table: one row per chunk, ascending by id, in arrays that grow and shrink cheaply."""

from __future__ import annotations

import numpy as np

from memlong.bank.arrays import Floats, Ids
from memlong.bank.eviction import Usage


class ChunkTable:
    """Ids, embeddings, spans and usage counters of the chunks in a bank.

    Rows lie in one window of the arrays' capacity, in ascending id order. Appending doubles the capacity when
    there is no room; removing moves the shorter side of the window over the hole, so that evicting the oldest
    chunks moves nothing at all. The properties are views of the window, valid until the next change.

    Parameters
    ----------
    dim : int
        Width of the embeddings.
    """

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._first = 0
        self._last = 0
        self._allocate(0)
        self.clock = 0

    def __len__(self) -> int:
        return self._last - self._first

    @property
    def ids(self) -> Ids:
        """int64 [n], ascending."""
        return self._ids[self._first : self._last]

    @property
    def embeddings(self) -> Floats:
        """float32 [n, dim], C-contiguous."""
        return self._embeddings[self._first : self._last]

    @property
    def squared_norms(self) -> Floats:
        """float32 [n], the squared length of each embedding."""
        return self._squared_norms[self._first : self._last]

    @property
    def spans(self) -> Ids:
        """int64 [n, 2], token positions [start, end)."""
        return self._spans[self._first : self._last]

    @property
    def usage(self) -> Usage:
        """Ids, retrieval counts and last uses, oldest chunk first."""
        window = slice(self._first, self._last)
        return Usage(self._ids[window], self._retrievals[window], self._last_used[window])

    def usage_with(self, ids: Ids) -> Usage:
        """Return the usage as it would be with new chunks `ids` appended now."""
        usage = self.usage
        return Usage(
            np.concatenate([usage.ids, ids]),
            np.concatenate([usage.retrievals, np.zeros_like(ids)]),
            np.concatenate([usage.last_used, np.full_like(ids, self.clock + 1)]),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the embeddings held, without spare capacity."""
        return int(self.embeddings.nbytes)

    def rows_of(self, ids: Ids) -> Ids:
        """Return the row of each id, -1 where the table does not hold it; same shape as `ids`."""
        if not len(self):
            return np.full_like(ids, -1)
        rows = np.minimum(np.searchsorted(self.ids, ids), len(self) - 1)
        rows[self.ids[rows] != ids] = -1
        return rows

    def append(self, ids: Ids, embeddings: Floats, spans: Ids) -> None:
        """Add rows with ids above all present ones; being added counts as being used now."""
        self.clock += 1
        count = len(ids)
        self._make_room(count)
        new = slice(self._last, self._last + count)
        norms = np.einsum("nd,nd->n", embeddings, embeddings, dtype=np.float64)
        self._ids[new] = ids
        self._embeddings[new] = embeddings
        self._squared_norms[new] = norms
        self._spans[new] = spans
        self._retrievals[new] = 0
        self._last_used[new] = self.clock
        self._last += count

    def mark_retrieved(self, rows: Ids) -> None:
        """Count one retrieval for every row number in `rows`; a row may come more than once."""
        self.clock += 1
        window = slice(self._first, self._last)
        np.add.at(self._retrievals[window], rows, 1)
        self._last_used[window][rows] = self.clock

    def truncate(self, length: int) -> None:
        """Forget the newest rows, so that `length` stay."""
        self._last = self._first + length

    def remove(self, rows: Ids) -> None:
        """Forget the rows with these distinct numbers."""
        if not len(rows):
            return
        keep = np.ones(len(self), dtype=bool)
        keep[rows] = False
        lowest, highest = int(rows.min()), int(rows.max())
        if highest < len(self) - lowest:
            kept = keep[: highest + 1]
            target = self._first + highest + 1 - int(kept.sum())
            self._move(self._first + np.flatnonzero(kept), target)
            self._first = target
        else:
            kept = keep[lowest:]
            target = self._first + lowest
            self._move(target + np.flatnonzero(kept), target)
            self._last = target + int(kept.sum())

    def clear(self) -> None:
        """Forget every row and give the memory back."""
        self._first = self._last = 0
        self._allocate(0)

    def _columns(self) -> tuple[Ids | Floats, ...]:
        return (
            self._ids,
            self._embeddings,
            self._squared_norms,
            self._spans,
            self._retrievals,
            self._last_used,
        )

    def _allocate(self, capacity: int) -> None:
        self._ids: Ids = np.empty(capacity, dtype=np.int64)
        self._embeddings: Floats = np.empty((capacity, self._dim), dtype=np.float32)
        self._squared_norms: Floats = np.empty(capacity, dtype=np.float32)
        self._spans: Ids = np.empty((capacity, 2), dtype=np.int64)
        self._retrievals: Ids = np.empty(capacity, dtype=np.int64)
        self._last_used: Ids = np.empty(capacity, dtype=np.int64)

    def _move(self, sources: Ids, target: int) -> None:
        for column in self._columns():
            column[target : target + len(sources)] = column[sources]

    def _make_room(self, count: int) -> None:
        if self._last + count <= len(self._ids):
            return
        length = len(self)
        before = self._columns()
        window = slice(self._first, self._last)
        if length + count > len(self._ids) // 2:
            self._allocate(max(2 * (length + count), 64))
        for old, new in zip(before, self._columns(), strict=True):
            new[:length] = old[window]
        self._first, self._last = 0, length
