"""SessionIndex: the index over a bank's table that Milvus holds, and what Milvus may not show yet."""

from __future__ import annotations

import time

import numpy as np
import torch

from memlong.bank import Floats, Ids, Index, IndexRows
from memlong.bank.index.exact import nearest_rows
from memlong_milvus.options import MilvusOptions
from memlong_milvus.rows import MOST_ROWS, SessionRows

_SPARE, _MOST_SPARE = 8, 256


class SessionIndex(Index[MilvusOptions]):
    """The rows of one session as the index over a bank's table, in step with it except during a change."""

    options_class = MilvusOptions
    repairs_before_changes = True  # so that a bank that resumes the session finds what was added

    def __init__(self, rows: IndexRows, options: MilvusOptions, session: SessionRows) -> None:
        super().__init__(rows, options)
        self._session = session
        self._staleness = 0.0 if session.is_current else options.staleness
        self._recent: tuple[tuple[float, int | None, int], ...] = ()
        self._is_empty = True
        self._standing: Ids = np.empty(0, dtype=np.int64)

    def add(self, ids: Ids, embeddings: Floats) -> None:
        """Write the rows of chunks in the table, except those that `reset` has found there."""
        fresh = ~np.isin(ids, self._standing)
        self._standing = self._standing[:0]
        self._is_empty = False
        ids = ids[fresh]
        if len(ids):
            self._session.upsert(ids, embeddings[fresh], self.rows.spans[self.rows.rows_of(ids)])
            self._note(added_from=int(ids[0]))

    def search(self, queries: Floats, k: int) -> Ids:
        """Name candidates for the k best chunks of each query, int64 [q, c]; -1 stands for none."""
        recent = self._young()
        spare = _SPARE + min(sum(removed for _, _, removed in recent), _MOST_SPARE)
        found = self._session.search(queries, min(MOST_ROWS, k + spare), self.options.ef)
        added_from = min((lowest for _, lowest, _ in recent if lowest is not None), default=None)
        if added_from is None:
            return found
        first = int(np.searchsorted(self.rows.ids, added_from))
        if first == len(self.rows):
            return found
        rows = nearest_rows(
            torch.from_numpy(queries),
            torch.from_numpy(self.rows.embeddings[first:]),
            torch.from_numpy(self.rows.squared_norms[first:]),
            min(k, len(self.rows) - first),
            self.rows.similarity,
        ).numpy()
        return np.concatenate([found, np.where(rows < 0, -1, self.rows.ids[first:][rows])], axis=1)

    def remove(self, ids: Ids) -> bool:
        """Remove rows."""
        self._session.delete(ids)
        self._note(removed=len(ids))
        return True

    def reset(self) -> None:
        """Remove the rows of chunks that the table does not hold, and note the others.

        Those are right: an id is given again only after a failed add, and the next add writes its row again.
        """
        if self._is_empty:
            return
        held = self._session.held(self.rows.ids)
        is_wanted = self.rows.rows_of(held) >= 0
        if not is_wanted.all():
            self.remove(held[~is_wanted])
        self._standing = held[is_wanted]

    def take_over(self) -> None:
        """Expect rows that an earlier bank wrote, perhaps just now."""
        self._is_empty = False
        self._note(added_from=0)

    def _note(self, *, added_from: int | None = None, removed: int = 0) -> None:
        if self._staleness:
            self._recent = (*self._young(), (time.monotonic(), added_from, removed))

    def _young(self) -> tuple[tuple[float, int | None, int], ...]:
        """Return the changes that Milvus may not show yet: when, the least id added, how many were removed."""
        since = time.monotonic() - self._staleness
        return tuple(each for each in self._recent if each[0] >= since)
