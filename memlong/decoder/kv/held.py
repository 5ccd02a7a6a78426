"""Which tokens the columns of a window hold, kept on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from memlong.bank.store.copying import to_device
from memlong.decoder.arrays import Bools, Ints
from memlong.decoder.model.rope import AngleCache

PADDING = -1
"""Instead of a token's index, where a column holds none."""


@dataclass(frozen=True, eq=False)
class Held:
    """Which tokens the columns of some layers hold, and where they stand.

    Attributes
    ----------
    tokens
        [rows, columns]: which token of its stream a column holds, counted from 0; −1 for padding. Columns of a row
        ascend; rows may have padding anywhere, since what a token sees goes by place.
    positions
        [rows, columns]: where keys are rotated to.
    reach
        How many tokens, a coming one included, a sliding layer keeps; None for the local window.
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
    def places(self) -> Ints:
        """[rows, columns]: by which it is told who sees whom. A sliding window counts the tokens of the text."""
        return self.positions if self.reach is None else self.tokens

    def angles(self, device: torch.device) -> AngleCache:
        """Angles of the columns."""
        if not self._angles:
            self._angles.append(AngleCache(to_device(torch.from_numpy(self.positions), device)))
        return self._angles[0]

    def of_rows(self, rows: Sequence[int]) -> Held:
        """Those of these rows."""
        numbers = np.asarray(rows, dtype=np.int64)
        return Held(self.tokens[numbers], self.positions[numbers], self.reach)

    def and_then(self, tokens: Ints, positions: Ints) -> Held:
        """Return these and columns behind them."""
        return Held(
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
