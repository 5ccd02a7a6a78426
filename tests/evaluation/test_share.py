"""Shares of trials, with Wilson's intervals."""

from __future__ import annotations

import pytest

from memlong.evaluation import Share


@pytest.mark.parametrize("count", [0, 1, 20, 24])
def test_the_interval_is_that_of_scipy(count):
    stats = pytest.importorskip("scipy.stats")
    share = Share.of([True] * count + [False] * (24 - count))
    expected = stats.binomtest(count, 24).proportion_ci(method="wilson")
    assert (share.count, share.trials, share.value) == (count, 24, count / 24)
    assert (share.low, share.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_it_is_said_in_percent():
    assert str(Share.of([True] * 20 + [False] * 4)) == "83% [64%, 93%]"


def test_no_trials_have_no_share():
    assert Share.of([]) is None
