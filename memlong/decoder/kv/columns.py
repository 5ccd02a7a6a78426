"""Which token each column of a window holds, and its position; kept on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from memlong.bank.store.copying import to_device
from memlong.decoder.arrays import Bools, Ints
from memlong.decoder.model.rope import AngleCache

PADDING = -1
"""Stands for a token's index where a column holds none."""


@dataclass(frozen=True, eq=False)
class WindowColumns:
    """Which tokens the columns of some layers hold, and their positions.

    Attributes
    ----------
    tokens
        [rows, columns]: the index of a column's token in its stream; −1 for padding. The tokens of a row ascend;
        padding may be anywhere, since visibility does not depend on a token's column.
    positions
        [rows, columns]: the positions that keys are rotated to.
    reach
        How many tokens a sliding-window layer keeps, including the next one; None for the local window.
    """

    tokens: Ints
    positions: Ints
    reach: int | None
    _angles: list[AngleCache] = field(default_factory=list, repr=False)

    @property
    def valid(self) -> Bools:
        """[rows, columns]: False for padding."""
        valid: Bools = self.tokens != PADDING
        return valid

    @property
    def order(self) -> Ints:
        """[rows, columns]: what decides visibility: positions, or in a sliding layer's own window, token indices."""
        return self.positions if self.reach is None else self.tokens

    def angles(self, device: torch.device) -> AngleCache:
        """Rotation angles of the columns, computed once."""
        if not self._angles:
            self._angles.append(AngleCache(to_device(torch.from_numpy(self.positions), device)))
        return self._angles[0]

    def of_rows(self, rows: Sequence[int]) -> WindowColumns:
        """Return the columns of these rows."""
        numbers = np.asarray(rows, dtype=np.int64)
        return WindowColumns(self.tokens[numbers], self.positions[numbers], self.reach)

    def appended(self, tokens: Ints, positions: Ints) -> WindowColumns:
        """Return these columns followed by new ones."""
        return WindowColumns(
            np.concatenate([self.tokens, tokens], axis=1),
            np.concatenate([self.positions, positions], axis=1),
            self.reach,
        )

    def kept(self, wanted: Bools) -> tuple[Ints | Sequence[slice], Ints]:
        """Return the columns marked in ``wanted`` [rows, columns], and their tokens [rows, kept]."""
        if (wanted == wanted[:1]).all():
            edges = np.flatnonzero(np.diff(wanted[0].astype(np.int8), prepend=0, append=0))
            stretches = [slice(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
            return stretches or [slice(0, 0)], self.tokens[:, wanted[0]]
        # Rows keep different columns: gather each row's own, and pad the shorter rows on the left.
        width = int(wanted.sum(axis=1).max())
        columns = np.argsort(wanted, axis=1, kind="stable")[:, wanted.shape[1] - width :]
        held = np.take_along_axis(wanted, columns, axis=1)
        return columns, np.where(held, np.take_along_axis(self.tokens, columns, axis=1), PADDING)
