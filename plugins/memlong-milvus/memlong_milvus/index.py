"""SessionIndex: the index over a bank's table that Milvus holds, and what of it Milvus may not show yet."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from memlong.bank import Floats, Ids, Index, IndexRows
from memlong.bank.index.exact import nearest_rows
from memlong_milvus.options import MilvusOptions
from memlong_milvus.recent import Recent
from memlong_milvus.rows import MOST_ROWS, SessionRows

_SPARE, _MOST_SPARE = 8, 256


class SessionIndex(Index[MilvusOptions]):
    """The rows of one session as the index over a bank's table.

    Parameters
    ----------
    rows : IndexRows
        Of the bank, in step with the session's but for what the bank does at the time.
    options : MilvusOptions
        How to search.
    session : SessionRows
        Of the session.
    next_id : callable
        The id that the bank's next chunk will get.
    """

    options_class = MilvusOptions
    repairs_before_changes = True  # so that whoever continues the session finds what was added

    def __init__(
        self, rows: IndexRows, options: MilvusOptions, session: SessionRows, next_id: Callable[[], int]
    ) -> None:
        super().__init__(rows, options)
        self._session, self._next_id = session, next_id
        self._recent = Recent(0.0 if session.is_current else options.staleness)
        self._is_empty = True
        self._standing: Ids = np.empty(0, dtype=np.int64)

    def add(self, ids: Ids, embeddings: Floats) -> None:
        """Write the rows of chunks that are in the table, but for those that `reset` has found there."""
        fresh = ~np.isin(ids, self._standing)
        self._standing = self._standing[:0]
        self._is_empty = False
        ids = ids[fresh]
        if len(ids):
            self._session.upsert(ids, embeddings[fresh], self.rows.spans[self.rows.rows_of(ids)])
            self._recent.note_added(int(ids[0]))

    def search(self, queries: Floats, k: int) -> Ids:
        """Name candidates for the k best chunks of each query, int64 [q, c]; -1 stands for none."""
        spare = _SPARE + min(self._recent.removed(), _MOST_SPARE)
        found = self._session.search(queries, min(MOST_ROWS, k + spare), self.options.ef)
        lowest = self._recent.lowest_added()
        first = len(self.rows) if lowest is None else int(np.searchsorted(self.rows.ids, lowest))
        if first == len(self.rows):
            return found
        return np.concatenate([found, self._newest(queries, k, first)], axis=1)

    def _newest(self, queries: Floats, k: int, first: int) -> Ids:
        rows = nearest_rows(
            torch.from_numpy(queries),
            torch.from_numpy(self.rows.embeddings[first:]),
            torch.from_numpy(self.rows.squared_norms[first:]),
            min(k, len(self.rows) - first),
            self.rows.similarity,
        ).numpy()
        ids: Ids = np.where(rows < 0, -1, self.rows.ids[first:][rows])
        return ids

    def remove(self, ids: Ids) -> bool:
        """Remove rows."""
        self._session.delete(ids)
        self._recent.note_removed(len(ids))
        return True

    def reset(self) -> None:
        """Remove the rows of chunks that the table does not hold, and note which rows of others are there.

        A row of a chunk in the table is right: the ids of chunks that are gone are not given again, but for those of an
        add that failed, and the next add writes those again.
        """
        if self._is_empty:
            return
        held = self._session.held(self._next_id())
        is_wanted = self.rows.rows_of(held) >= 0
        if not is_wanted.all():
            self.remove(held[~is_wanted])
        self._standing = held[is_wanted]

    def take_over(self) -> None:
        """Reckon with rows that an earlier bank wrote, perhaps just now."""
        self._is_empty = False
        self._recent.note_added(0)
