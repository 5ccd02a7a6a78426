"""Map rows of a native index to chunk ids, and track which rows are dead."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from memlong.bank.arrays import Ids


class RowNumbers:
    """The chunk id of each row, in ascending order, and whether it is alive; appending is amortized O(1) per row.

    Parameters
    ----------
    ids : numpy.ndarray
        int64 [n], chunk id of each initial row.
    alive : numpy.ndarray
        bool [n], whether that chunk is still in the bank.
    """

    def __init__(self, ids: Ids, alive: npt.NDArray[np.bool_]) -> None:
        self._ids, self._alive = ids, alive
        self._count = len(ids)
        self.dead = self._count - int(alive.sum())

    def __len__(self) -> int:
        return self._count

    @property
    def ids(self) -> Ids:
        """int64 [n], chunk id of each row."""
        return self._ids[: self._count]

    @property
    def alive(self) -> npt.NDArray[np.bool_]:
        """Bool [n], whether each row's chunk is still in the bank."""
        return self._alive[: self._count]

    def append(self, ids: Ids) -> None:
        """Append rows; their ids must be higher than all others."""
        count = self._count + len(ids)
        if count > len(self._ids):
            capacity = max(2 * count, 64)
            ids_before, alive_before = self.ids, self.alive
            self._ids, self._alive = np.empty(capacity, dtype=np.int64), np.empty(capacity, dtype=bool)
            self._ids[: self._count], self._alive[: self._count] = ids_before, alive_before
        self._ids[self._count : count] = ids
        self._alive[self._count : count] = True
        self._count = count

    def bury(self, ids: Ids) -> None:
        """Mark the rows of living chunks as dead."""
        self._alive[np.searchsorted(self.ids, ids)] = False
        self.dead += len(ids)
