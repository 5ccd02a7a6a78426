from __future__ import annotations

import numpy as np
import pytest

from memlong.errors import InvalidArgumentError
from memlong.evaluation import perplexity_ratio


def losses(tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).exponential(2.0, tokens)


def test_the_value_is_the_ratio_of_the_perplexities():
    one, other = losses(1000), losses(1000, seed=1)
    expected = np.exp(one.mean()) / np.exp(other.mean())
    assert perplexity_ratio(one, other).value == pytest.approx(expected)


def test_only_the_marked_tokens_count():
    one, other = losses(1000), losses(1000, seed=1)
    where = np.arange(1000) % 7 == 0
    expected = np.exp(one[where].mean() - other[where].mean())
    assert perplexity_ratio(one, other, where=where).value == pytest.approx(expected)


def test_a_constant_difference_has_an_interval_of_no_width():
    base = losses(2000)
    ratio = perplexity_ratio(base + np.log(0.9), base)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((0.9, 0.9, 0.9))


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        base = losses(4096, seed)
        change = np.random.default_rng(1000 + seed).normal(np.log(0.95), 0.5, 4096)
        ratio = perplexity_ratio(base + change, base, samples=300, block=64)
        covered += ratio.low <= 0.95 <= ratio.high
    assert 85 <= covered <= 100


def test_the_same_seed_gives_the_same_interval():
    one, other = losses(1000), losses(1000, seed=1)
    assert perplexity_ratio(one, other, seed=3) == perplexity_ratio(one, other, seed=3)


def test_systems_that_score_other_tokens_cannot_be_compared():
    with pytest.raises(InvalidArgumentError, match="systems on the same tokens"):
        perplexity_ratio(losses(10), losses(11))
    with pytest.raises(InvalidArgumentError, match="where must mark at least one token"):
        perplexity_ratio(losses(10), losses(10), where=np.zeros(10, dtype=bool))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block": 0}, "block must be at least 1 token, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"confidence": 2.0}, "confidence must be between 0 and 1, got 2.0"),
        ({"where": np.ones(3, dtype=bool)}, "where must be bool"),
    ],
)
def test_draws_that_cannot_be_are_said(options, words):
    with pytest.raises(InvalidArgumentError, match=words):
        perplexity_ratio(losses(10), losses(10), **options)
    with pytest.raises(InvalidArgumentError, match="must be finite, got infinite values or NaN"):
        perplexity_ratio(losses(10) * np.nan, losses(10))
