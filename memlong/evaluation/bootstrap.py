"""Confidence intervals: for the comparison of two systems on the same tokens, and for an accuracy."""

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


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers and its confidence interval."""

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
    """Perplexity over a baseline's, with a paired block-bootstrap interval.

    Neighbouring tokens are alike, so whole blocks are drawn, the same ones for both systems.

    Parameters
    ----------
    nll, baseline_nll
        [tokens]: negative log-likelihood of the same tokens, in order, in nats.
    where
        [tokens], bool: count only these, for instance the long-range ones; blocks are of the text all the same.
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
        If the two do not score the same number of tokens, ``where`` is of another number or leaves none, a loss is not
        finite, or ``block``, ``samples`` or ``confidence`` cannot be.
    """
    if nll.shape != baseline_nll.shape or nll.ndim != 1 or not nll.size:
        raise InvalidArgumentError(
            f"nll is {nll.shape} and baseline_nll is {baseline_nll.shape}; expected two equal lengths, since "
            "only systems that score the same tokens can be compared."
        )
    _check_draws(samples, confidence)
    if block < 1:
        raise InvalidArgumentError(f"block is {block}; expected at least 1 token.")
    if not (np.isfinite(nll).all() and np.isfinite(baseline_nll).all()):
        raise InvalidArgumentError(
            "A loss is infinite or NaN; expected finite numbers: look for what went wrong."
        )
    if where is not None and (where.shape != nll.shape or where.dtype != np.bool_):
        raise InvalidArgumentError(
            f"where is {where.dtype} {where.shape}; expected bool, and one for each of the {nll.size} tokens."
        )
    counted = np.ones(nll.shape, dtype=np.bool_) if where is None else where
    if not counted.any():
        raise InvalidArgumentError("where marks no token; expected at least one to compare.")
    starts = np.arange(0, nll.size, block)
    sums = np.add.reduceat(np.where(counted, nll - baseline_nll, 0.0), starts)
    sizes = np.add.reduceat(counted.astype(np.int64), starts)
    drawn = np.random.default_rng(seed).integers(0, starts.size, (samples, starts.size))
    drawn_sizes = sizes[drawn].sum(axis=1)
    ratios = np.exp(sums[drawn].sum(axis=1)[drawn_sizes > 0] / drawn_sizes[drawn_sizes > 0])
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Ratio(float(np.exp(sums.sum() / sizes.sum())), float(low), float(high))


def accuracy_interval(
    right: NDArray[np.bool_],
    *,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Accuracy:
    """Share of right answers, with a bootstrap interval.

    Parameters
    ----------
    right
        [answers], bool: whether each is right. Where all are, or none, the interval has no width.
    samples
        How often to draw.
    confidence
        Coverage of the interval.
    seed
        Seed of the draws.

    Raises
    ------
    InvalidArgumentError
        If there is no answer, or ``samples`` or ``confidence`` cannot be.
    """
    if right.ndim != 1 or not right.size:
        raise InvalidArgumentError(f"right is {right.shape}; expected one answer or more, [answers].")
    _check_draws(samples, confidence)
    drawn = np.random.default_rng(seed).integers(0, right.size, (samples, right.size))
    tail = (1 - confidence) / 2
    low, high = np.quantile(right[drawn].mean(axis=1), [tail, 1 - tail])
    return Accuracy(float(right.mean()), float(low), float(high))


def _check_draws(samples: int, confidence: float) -> None:
    if samples < 1:
        raise InvalidArgumentError(f"samples is {samples}; expected at least 1 draw.")
    if not 0 < confidence < 1:
        raise InvalidArgumentError(f"confidence is {confidence}; expected a share between 0 and 1.")
