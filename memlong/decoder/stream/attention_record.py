"""What the counted tokens of many forward calls gave of their attention to each retrieved chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlong.bank.store.copying import to_device
from memlong.decoder.arrays import Ints
from memlong.decoder.model.notes import AttentionNotes


@dataclass(frozen=True)
class HeldChunk:
    """A retrieved chunk.

    Attributes
    ----------
    bank
        Where it is from, while that lives.
    id
        Its id there; None if it is in no bank, or its id is not known.
    span
        Its first token, and that after its last.
    """

    bank: ref[Any] | None
    id: int | None
    span: tuple[int, int]


@dataclass(frozen=True)
class Counted:
    """Which tokens of a forward call count, padding apart.

    Attributes
    ----------
    latest
        So many of the latest tokens of each row; None for all.
    times
        How often each of them counts, for all rows or by row [rows]; called only if attention is recorded.
    copies
        Rows of the call for each row of the batch, next to each other.
    """

    latest: int | None = None
    times: Callable[[], Tensor | float] = lambda: 1.0
    copies: int = 1

    def weights(self, tokens: Ints, device: torch.device) -> Tensor:
        """Return how often each of the latest tokens [rows, new], −1 where padded, counts [rows, latest]."""
        is_real = torch.from_numpy(tokens >= 0)
        if self.latest is not None:
            is_real = is_real[:, -self.latest :]
        times = self.times()
        weights = to_device(is_real.float(), device)
        return weights * (times.to(device)[:, None] if isinstance(times, Tensor) else times)


class AttentionRecord:
    """Sums over forward calls.

    Parameters
    ----------
    layers
        The retrieval layers.
    chunk_size
        Tokens of a chunk.

    Attributes
    ----------
    asked
        By row, how many pairs of a query head and a token counted [layers].
    given
        By row and chunk, what these gave to the chunk [layers].
    """

    def __init__(self, layers: Sequence[int], chunk_size: int) -> None:
        self.layers = tuple(layers)
        self._chunk_size = chunk_size
        self.asked: dict[int, NDArray[np.float64]] = {}
        self.given: dict[tuple[int, HeldChunk], NDArray[np.float64]] = {}

    def add(self, notes: AttentionNotes, counted: Counted, held: Sequence[Sequence[HeldChunk]]) -> None:
        """Add the notes of a forward call, whose rows ``held`` these chunks, in the order of the columns."""
        asked = self._numbers(notes.asked)  # [layers, rows]
        if asked is None:
            return
        for number, mine in enumerate(asked.T):
            if mine.any():
                row = number // counted.copies
                self.asked[row] = self.asked.get(row, 0) + mine
        by_token = self._numbers(notes.given)
        if by_token is None:
            return
        given = by_token.reshape(*by_token.shape[:2], -1, self._chunk_size).sum(axis=3)
        for number, chunks in enumerate(held):
            if asked[:, number].any():
                for place, chunk in enumerate(chunks):
                    name = number // counted.copies, chunk
                    self.given[name] = self.given.get(name, 0) + given[:, number, place]

    def _numbers(self, noted: dict[int, Tensor]) -> NDArray[np.float64] | None:
        """Return what was noted of each layer [layers, ...], in one copy to the host; None if nothing was."""
        if not noted:
            return None
        some = next(iter(noted.values()))
        each = [noted[layer] if layer in noted else torch.zeros_like(some) for layer in self.layers]
        numbers: NDArray[np.float64] = torch.stack(each).cpu().double().numpy()
        return numbers
