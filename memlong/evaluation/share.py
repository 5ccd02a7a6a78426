"""Shares of trials, with confidence intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist


@dataclass(frozen=True)
class Share:
    """A share of trials, and its confidence interval.

    Attributes
    ----------
    count, trials
        How many trials of how many.
    value
        Their share.
    low, high
        Its 95 % confidence interval by Wilson's score (Wilson, 1927).
    """

    count: int
    trials: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, trials: Iterable[bool]) -> Share | None:
        """Return the share of trials that are true; None of no trials."""
        each = list(trials)
        if not each:
            return None
        count, n = sum(each), len(each)
        z = NormalDist().inv_cdf(0.975)
        share = count / n
        middle = share + z * z / (2 * n)
        reach = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        return cls(count, n, share, max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale))

    def __str__(self) -> str:
        """The share and its interval, in percent."""
        return f"{self.value:.0%} [{self.low:.0%}, {self.high:.0%}]"
