"""Which chunk each row of a native index is, and which rows are dead."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from memlong.bank.arrays import Ids


class RowNumbers:
    """Rows numbered from 0, each a chunk's, ascending by id; appending costs what is appended.

    Parameters
    ----------
    ids : numpy.ndarray
        int64 [n], the chunk of each row at first.
    alive : numpy.ndarray
        bool [n], whether it is still in the bank.
    """

    def __init__(self, ids: Ids, alive: npt.NDArray[np.bool_]) -> None:
        self._ids, self._alive = ids, alive
        self._count = len(ids)
        self.dead = self._count - int(alive.sum())

    def __len__(self) -> int:
        return self._count

    @property
    def ids(self) -> Ids:
        """int64 [n], the chunk of each row."""
        return self._ids[: self._count]

    @property
    def alive(self) -> npt.NDArray[np.bool_]:
        """Bool [n]."""
        return self._alive[: self._count]

    def append(self, ids: Ids) -> None:
        """Number new rows, of chunks with ids above all others."""
        count = self._count + len(ids)
        if count > len(self._ids):
            room = max(2 * count, 64)
            ids_before, alive_before = self.ids, self.alive
            self._ids, self._alive = np.empty(room, dtype=np.int64), np.empty(room, dtype=bool)
            self._ids[: self._count], self._alive[: self._count] = ids_before, alive_before
        self._ids[self._count : count] = ids
        self._alive[self._count : count] = True
        self._count = count

    def bury(self, ids: Ids) -> None:
        """Have the rows of chunks that are alive be dead."""
        self._alive[np.searchsorted(self.ids, ids)] = False
        self.dead += len(ids)
