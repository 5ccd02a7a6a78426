"""The bank's table: one row per chunk, ascending by id, in arrays that grow and shrink cheaply."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from memlong.bank.arrays import Floats, Ids
from memlong.bank.eviction import Usage

_IDS, _EMBEDDINGS, _SQUARED_NORMS, _SPANS, _RETRIEVALS, _LAST_USED = range(6)


@dataclass(frozen=True, eq=False)
class TableRows:
    """The rows of a table at one time: arrays, and the window of them that is in use.

    Attributes
    ----------
    columns : tuple of numpy.ndarray
        Ids, embeddings, squared norms, spans, retrievals and last uses, all of one capacity.
    first, last : int
        The window [first, last).
    longest : float
        No embedding in the window is longer; one that has left may have been this long.
    """

    columns: tuple[npt.NDArray[Any], ...]
    first: int
    last: int
    longest: float

    @classmethod
    def empty(cls, capacity: int, dim: int) -> TableRows:
        """Return no rows, with room for as many as `capacity`."""
        columns = (
            np.empty(capacity, dtype=np.int64),
            np.empty((capacity, dim), dtype=np.float32),
            np.empty(capacity, dtype=np.float32),
            np.empty((capacity, 2), dtype=np.int64),
            np.empty(capacity, dtype=np.int64),
            np.empty(capacity, dtype=np.int64),
        )
        return cls(columns, 0, 0, 0.0)

    @property
    def window(self) -> slice:
        """Where the rows lie."""
        return slice(self.first, self.last)

    @property
    def capacity(self) -> int:
        """How many rows the arrays have room for."""
        return len(self.columns[0])

    @property
    def usage(self) -> Usage:
        """Ids, retrieval counts and last uses, not to be written to."""
        views = [self.columns[number][self.window] for number in (_IDS, _RETRIEVALS, _LAST_USED)]
        for view in views:
            view.flags.writeable = False
        return Usage(*views)

    def measured(self) -> TableRows:
        """Return these rows with `longest` measured again."""
        longest = math.sqrt(self.columns[_SQUARED_NORMS][self.window].max(initial=0.0))
        return replace(self, longest=longest)

    def __len__(self) -> int:
        return self.last - self.first


class ChunkTable:
    """Ids, embeddings, spans and usage counters of the chunks in a bank.

    Rows lie in one window of the arrays' capacity, in ascending id order. Appending writes behind the window, and
    doubles the capacity when there is no room; removing the oldest or newest chunks makes the window smaller, and
    removing others copies the rest to new arrays. A change is one assignment, and leaves the rows that were as they
    are until the next append: so it happens as a whole, and can be undone. The properties are views of the window,
    valid until the next change.

    Parameters
    ----------
    dim : int
        Width of the embeddings.
    """

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._rows = TableRows.empty(0, dim)
        self.clock = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> TableRows:
        """All rows, for `restore`."""
        return self._rows

    @property
    def ids(self) -> Ids:
        """int64 [n], ascending."""
        return self._rows.columns[_IDS][self._rows.window]

    @property
    def embeddings(self) -> Floats:
        """float32 [n, dim], C-contiguous."""
        return self._rows.columns[_EMBEDDINGS][self._rows.window]

    @property
    def squared_norms(self) -> Floats:
        """float32 [n], the squared length of each embedding."""
        return self._rows.columns[_SQUARED_NORMS][self._rows.window]

    @property
    def longest(self) -> float:
        """A length that no embedding exceeds."""
        return self._rows.longest

    @property
    def spans(self) -> Ids:
        """int64 [n, 2], token positions [start, end)."""
        return self._rows.columns[_SPANS][self._rows.window]

    @property
    def usage(self) -> Usage:
        """Ids, retrieval counts and last uses, oldest chunk first."""
        return self._rows.usage

    def usage_with(self, ids: Ids) -> Usage:
        """Return the usage as it would be with new chunks `ids` appended now; they are noted behind the window."""
        self._rows = roomy = self._with_room(len(ids))
        longer = replace(roomy, last=roomy.last + len(ids))
        for number, given in ((_IDS, ids), (_RETRIEVALS, 0), (_LAST_USED, self.clock + 1)):
            longer.columns[number][roomy.last : longer.last] = given
        return longer.usage

    @property
    def nbytes(self) -> int:
        """Bytes of the embeddings held, without spare capacity."""
        return int(self.embeddings.nbytes)

    def rows_of(self, ids: Ids) -> Ids:
        """Return the row of each id, -1 where the table does not hold it; same shape as `ids`."""
        held = self.ids
        if not len(held):
            return np.full_like(ids, -1)
        if held[-1] - held[0] == len(held) - 1:  # no gaps, as where only the oldest have left
            rows: Ids = ids - held[0]
            rows[(rows < 0) | (rows >= len(held))] = -1
            return rows
        rows = held.searchsorted(ids)
        rows[held.take(rows, mode="clip") != ids] = -1
        return rows

    def rows_among(self, ids: Ids) -> Ids:
        """Return the rows of those of the ids that the table holds, ascending, each once."""
        if not (ids[1:] > ids[:-1]).all():
            ids = np.sort(ids)  # not np.unique, which takes ten times as long
            ids = ids[np.append(True, ids[1:] > ids[:-1])]
        rows = self.rows_of(ids)
        return rows[rows >= 0]

    def append(self, ids: Ids, embeddings: Floats, spans: Ids) -> None:
        """Add rows with ids above all present ones; being added counts as being used now."""
        self.clock += 1
        count = len(ids)
        roomy = self._with_room(count)
        new = slice(roomy.last, roomy.last + count)
        norms = np.einsum("nd,nd->n", embeddings, embeddings, dtype=np.float64)
        for column, given in zip(roomy.columns, (ids, embeddings, norms, spans, 0, self.clock), strict=True):
            column[new] = given
        longest = max(roomy.longest, math.sqrt(norms.max(initial=0.0)))
        self._rows = replace(roomy, last=roomy.last + count, longest=longest)

    def fill(
        self, ids: Ids, embeddings: Floats, spans: Ids, retrievals: Ids, last_used: Ids, clock: int
    ) -> None:
        """Begin with these rows, ascending by id, and the clock at this time; the embeddings are kept, not copied."""
        norms = np.einsum("nd,nd->n", embeddings, embeddings, dtype=np.float64)
        columns: tuple[npt.NDArray[Any], ...] = (
            np.array(ids, dtype=np.int64),
            np.require(embeddings, np.float32, ["C", "W"]),
            norms.astype(np.float32),
            *(np.array(each, dtype=np.int64) for each in (spans, retrievals, last_used)),
        )
        self.clock = clock
        self._rows = TableRows(columns, 0, len(ids), 0.0).measured()

    def mark_retrieved(self, rows: Ids) -> None:
        """Count one retrieval for every row number in `rows`; a row may come more than once."""
        self.clock += 1
        retrievals, last_used = (
            self._rows.columns[each][self._rows.window] for each in (_RETRIEVALS, _LAST_USED)
        )
        np.add.at(retrievals, rows, 1)
        last_used[rows] = self.clock

    def restore(self, rows: TableRows) -> None:
        """Go back to rows that there were before the last append and what followed it."""
        self._rows = rows

    def remove(self, rows: Ids) -> None:
        """Forget the rows with these distinct numbers."""
        count, now = len(rows), self._rows
        if not count:
            return
        if rows.max() == count - 1:  # the oldest
            self._rows = replace(now, first=now.first + count)
        elif rows.min() == len(self) - count:  # the newest
            self._rows = replace(now, last=now.last - count)
        else:
            keep = np.ones(len(self), dtype=bool)
            keep[rows] = False
            kept = np.flatnonzero(keep)
            self._rows = self._copied(kept, max(2 * len(kept), 64))

    def clear(self) -> None:
        """Forget every row and give the memory back."""
        self._rows = TableRows.empty(0, self._dim)

    def _with_room(self, count: int) -> TableRows:
        now = self._rows
        length = len(now)
        if now.last + count <= now.capacity:
            return now
        if length + count > now.capacity // 2:
            return self._copied(np.arange(length), max(2 * (length + count), 64))
        for column in now.columns:  # the window lies in the upper half, and stays as it is
            column[:length] = column[now.window]
        return replace(now, first=0, last=length).measured()

    def _copied(self, rows: Ids, capacity: int) -> TableRows:
        fresh = TableRows.empty(capacity, self._dim)
        for old, new in zip(self._rows.columns, fresh.columns, strict=True):
            np.take(old[self._rows.window], rows, axis=0, out=new[: len(rows)], mode="clip")
        return replace(fresh, last=len(rows)).measured()
