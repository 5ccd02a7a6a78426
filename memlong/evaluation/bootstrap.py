"""Confidence intervals for the comparison of two systems on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memlong.errors import InvalidArgumentError


@dataclass(frozen=True)
class Ratio:
    """A ratio of perplexities and its confidence interval."""

    value: float
    low: float
    high: float


def perplexity_ratio(
    nll: NDArray[np.float64],
    baseline_nll: NDArray[np.float64],
    *,
    block: int = 256,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Ratio:
    """Perplexity over a baseline's, with a paired block-bootstrap interval.

    Neighbouring tokens are alike, so whole blocks are drawn, the same ones for both systems.

    Parameters
    ----------
    nll, baseline_nll
        [tokens]: negative log-likelihood of the same tokens, in order, in nats.
    block
        Tokens in a block.
    samples
        How often to draw.
    confidence
        Coverage of the interval.
    seed
        Seed of the draws.

    Raises
    ------
    InvalidArgumentError
        If the two do not score the same number of tokens, or none.
    """
    if nll.shape != baseline_nll.shape or nll.ndim != 1 or not nll.size:
        raise InvalidArgumentError(
            f"nll is {nll.shape} and baseline_nll is {baseline_nll.shape}; expected two equal lengths, since only systems that "
            "score the same tokens can be compared."
        )
    difference = nll - baseline_nll
    starts = np.arange(0, difference.size, block)
    sums = np.add.reduceat(difference, starts)
    sizes = np.diff(np.append(starts, difference.size))
    drawn = np.random.default_rng(seed).integers(0, starts.size, (samples, starts.size))
    ratios = np.exp(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Ratio(float(np.exp(difference.mean())), float(low), float(high))
