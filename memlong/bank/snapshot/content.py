"""What a bank holds apart from keys and values, as arrays, and the checks of arrays that come from a file."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memlong.bank.arrays import Floats, Ids
from memlong.bank.eviction import Usage
from memlong.bank.snapshot.files import damaged

_LONGEST = 1e18
_UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Content:
    """Rows of a bank's table, ascending by id.

    Attributes
    ----------
    ids : numpy.ndarray
        int64 [n].
    embeddings : numpy.ndarray
        float32 [n, dim], as searched.
    spans : numpy.ndarray
        int64 [n, 2].
    retrievals, last_used : numpy.ndarray
        int64 [n].
    """

    ids: Ids
    embeddings: Floats
    spans: Ids
    retrievals: Ids
    last_used: Ids

    @property
    def usage(self) -> Usage:
        """As an eviction policy sees it."""
        return Usage(self.ids, self.retrievals, self.last_used)

    def rows(self, which: npt.NDArray[np.bool_] | Ids) -> Content:
        """Return some of the rows."""
        return replace(self, **{field.name: getattr(self, field.name)[which] for field in fields(self)})


def check_state(path: Path, ids: Ids, retrievals: Ids, last_used: Ids, next_id: int, clock: int) -> None:
    """Raise SnapshotError unless these can be the ids and counters of a bank."""
    if len(ids) and (ids[0] < 0 or ids[-1] >= next_id or (np.diff(ids) <= 0).any()):
        raise damaged(path, f"holds ids that do not ascend from 0 to {next_id - 1}")
    if len(ids) and (retrievals.min() < 0 or last_used.min() < 0 or last_used.max() > clock):
        raise damaged(path, f"holds counters below 0, or uses after the clock, {clock}")


def check_chunks(path: Path, ids: Ids, embeddings: Floats, spans: Ids, *, unit: bool) -> None:
    """Raise SnapshotError unless these can be the ids, embeddings and spans of a segment."""
    if ids[0] < 0 or (np.diff(ids) <= 0).any():
        raise damaged(path, "holds ids that do not ascend")
    if not np.isfinite(embeddings).all():
        raise damaged(path, "holds embeddings that are not finite (NaN or infinite)")
    lengths = np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings, dtype=np.float64))
    if unit and not ((np.abs(lengths - 1) < _UNIT_TOLERANCE) | (lengths == 0)).all():
        raise damaged(path, "holds embeddings that are not of length 1, as the cosine metric has them")
    if lengths.max() > _LONGEST:
        raise damaged(path, "holds embeddings that are too long to be compared in float32")
    if (spans[:, 0] < 0).any() or (spans[:, 0] >= spans[:, 1]).any():
        raise damaged(path, "holds spans that do not begin at 0 or later and end after that")
