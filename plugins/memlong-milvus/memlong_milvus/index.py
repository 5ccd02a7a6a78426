"""SessionIndex: the index over a bank's table that Milvus holds, and what of it Milvus may not show yet."""

from __future__ import annotations

import numpy as np
import torch

from memlong.bank import Floats, Ids
from memlong.bank.exact import Similarity, nearest_rows
from memlong.bank.table import ChunkTable
from memlong_milvus.options import Tuning
from memlong_milvus.recent import Recent
from memlong_milvus.rows import MOST_ROWS, SessionRows

_SPARE, _MOST_SPARE = 8, 256


class SessionIndex:
    """The rows of one session as the index over a bank's table.

    Parameters
    ----------
    rows : SessionRows
        Of the session.
    table : ChunkTable
        The bank's, in step with the rows but for what the bank does at the time.
    similarity : "inner_product" or "l2"
        What to rank by.
    tuning : Tuning
        How to search.
    is_current : bool
        Whether a search finds all that was written before it.
    """

    def __init__(
        self,
        rows: SessionRows,
        table: ChunkTable,
        similarity: Similarity,
        tuning: Tuning,
        *,
        is_current: bool,
    ) -> None:
        self._rows, self._table, self._similarity = rows, table, similarity
        self._effort = tuning.ef
        self._recent = Recent(0.0 if is_current else tuning.staleness)
        self._is_empty = True
        self._standing: Ids = np.empty(0, dtype=np.int64)

    def add(self, ids: Ids, embeddings: Floats) -> None:
        """Write the rows of chunks that are in the table, but for those that `reset` has found there."""
        fresh = ~np.isin(ids, self._standing)
        self._standing = self._standing[:0]
        self._is_empty = False
        ids = ids[fresh]
        if len(ids):
            self._rows.upsert(ids, embeddings[fresh], self._table.spans[self._table.rows_of(ids)])
            self._recent.note_added(int(ids[0]))

    def search(self, queries: Floats, k: int) -> Ids:
        """Name candidates for the k best chunks of each query, int64 [q, c]; -1 stands for none."""
        spare = _SPARE + min(self._recent.removed(), _MOST_SPARE)
        found = self._rows.search(queries, min(MOST_ROWS, k + spare), self._effort)
        lowest = self._recent.lowest_added()
        first = len(self._table) if lowest is None else int(np.searchsorted(self._table.ids, lowest))
        if first == len(self._table):
            return found
        return np.concatenate([found, self._newest(queries, k, first)], axis=1)

    def _newest(self, queries: Floats, k: int, first: int) -> Ids:
        rows = nearest_rows(
            torch.from_numpy(queries),
            torch.from_numpy(self._table.embeddings[first:]),
            torch.from_numpy(self._table.squared_norms[first:]),
            min(k, len(self._table) - first),
            self._similarity,
        ).numpy()
        ids: Ids = np.where(rows < 0, -1, self._table.ids[first:][rows])
        return ids

    def remove(self, ids: Ids) -> None:
        """Remove rows."""
        self._rows.delete(ids)
        self._recent.note_removed(len(ids))

    def reset(self, next_id: int) -> None:
        """Remove the rows of chunks that the table does not hold, and note which rows of others are there.

        A row of a chunk in the table is right: the ids of chunks that are gone are not given again, but for those of an
        add that failed, and the next add writes those anew.
        """
        if self._is_empty:
            return
        held = self._rows.held(next_id)
        is_wanted = self._table.rows_of(held) >= 0
        if not is_wanted.all():
            self.remove(held[~is_wanted])
        self._standing = held[is_wanted]

    def take_over(self) -> None:
        """Reckon with rows that an earlier bank wrote, perhaps just now."""
        self._is_empty = False
        self._recent.note_added(0)
