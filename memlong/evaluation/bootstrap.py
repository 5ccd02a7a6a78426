"""Bootstrap confidence intervals, for a paired comparison of two systems."""

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
    where: NDArray[np.bool_] | None = None,
    block: int = 256,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Ratio:
    """Return the ratio of two perplexities, with a paired block-bootstrap confidence interval.

    Nearby tokens are correlated, so whole blocks are resampled, the same ones for both systems.

    Parameters
    ----------
    nll, baseline_nll
        [tokens]: negative log-likelihood of the same tokens, in order, in nats.
    where
        [tokens], bool: count only these tokens, such as the long-range ones; blocks are still blocks of the whole text.
    block
        Block size in tokens.
    samples
        Number of bootstrap samples.
    confidence
        Confidence level of the interval.
    seed
        Random seed.

    Raises
    ------
    InvalidArgumentError
        If the two score different numbers of tokens, ``where`` has another shape or marks no token, a loss is not
        finite, or ``block``, ``samples`` or ``confidence`` is out of range.
    """
    if nll.shape != baseline_nll.shape or nll.ndim != 1 or not nll.size:
        raise InvalidArgumentError(
            f"nll and baseline_nll must be [tokens] of one length, got {nll.shape} and {baseline_nll.shape}: score "
            "both systems on the same tokens"
        )
    if samples < 1:
        raise InvalidArgumentError(f"samples must be at least 1, got {samples}")
    if not 0 < confidence < 1:
        raise InvalidArgumentError(f"confidence must be between 0 and 1, got {confidence}")
    if block < 1:
        raise InvalidArgumentError(f"block must be at least 1 token, got {block}")
    if not (np.isfinite(nll).all() and np.isfinite(baseline_nll).all()):
        raise InvalidArgumentError(
            "nll and baseline_nll must be finite, got infinite values or NaN: check the runs that produced them"
        )
    if where is not None and (where.shape != nll.shape or where.dtype != np.bool_):
        raise InvalidArgumentError(
            f"where must be bool of shape {nll.shape}, one per token, got {where.dtype} of shape {where.shape}"
        )
    counted = np.ones(nll.shape, dtype=np.bool_) if where is None else where
    if not counted.any():
        raise InvalidArgumentError("where must mark at least one token, got none")
    starts = np.arange(0, nll.size, block)
    sums = np.add.reduceat(np.where(counted, nll - baseline_nll, 0.0), starts)
    sizes = np.add.reduceat(counted.astype(np.int64), starts)
    drawn = np.random.default_rng(seed).integers(0, starts.size, (samples, starts.size))
    drawn_sizes = sizes[drawn].sum(axis=1)
    ratios = np.exp(sums[drawn].sum(axis=1)[drawn_sizes > 0] / drawn_sizes[drawn_sizes > 0])
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Ratio(float(np.exp(sums.sum() / sizes.sum())), float(low), float(high))
