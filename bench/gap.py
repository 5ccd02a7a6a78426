"""Gap closed: how far a system comes from the plain window toward the ceiling, with paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 256  # tokens; nearby ones are correlated
LEAST_BLOCKS = 12  # of a short stretch, such as the tokens that are read one at a time
SAMPLES = 1000


_GAIN, _LOSS = 2.0, 2.0  # in nats


@dataclass(frozen=True)
class Gap:
    """The gap closed, 1 at the ceiling, and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scored:
    """Losses [tokens] of the same tokens of one text in three systems, in nats, and which of them count."""

    nll: NDArray[np.float64]
    window: NDArray[np.float64]
    ceiling: NDArray[np.float64]
    where: NDArray[np.bool_]


def key_tokens(window: NDArray[np.float64], ceiling: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which tokens [tokens] a long context makes likely, by losses with a short one and a long one.

    As LongPPL (arXiv 2410.23771) defines them, which scores these alone.
    """
    found: NDArray[np.bool_] = (window - ceiling > _GAIN) & (ceiling < _LOSS)
    return found


def gap_closed(texts: Sequence[Scored]) -> Gap | None:
    """Return the mean over texts of ln(window / it) / ln(window / ceiling), in perplexities.

    Blocks of each text are resampled, the same for all three systems; where a text is short they are smaller, and the
    interval may be too narrow. None if a text has no token that counts, or its ceiling is no better than its window:
    then there is no gap to close.
    """
    values, draws = [], []
    for number, text in enumerate(texts):
        size = max(1, min(BLOCK, text.nll.size // LEAST_BLOCKS))
        starts = np.arange(0, text.nll.size, size)
        closed, whole = (
            np.add.reduceat(np.where(text.where, text.window - other, 0.0), starts)
            for other in (text.nll, text.ceiling)
        )
        if whole.sum() <= 0:
            return None
        drawn = np.random.default_rng(number).integers(0, starts.size, (SAMPLES, starts.size))
        values.append(closed.sum() / whole.sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            draws.append(closed[drawn].sum(axis=1) / whole[drawn].sum(axis=1))
    means = np.mean(draws, axis=0)
    low, high = np.quantile(means[np.isfinite(means)], [0.025, 0.975])
    return Gap(float(np.mean(values)), float(low), float(high))
