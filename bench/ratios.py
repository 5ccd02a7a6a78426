"""Shared by the benchmarks: alternating timings, ratios with targets, and a summary line."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Clock(StrEnum):
    """Which clock to use."""

    WALL = "wall"
    CPU = "cpu"

    def now(self) -> float:
        """Seconds by this clock."""
        return time.perf_counter() if self is Clock.WALL else time.process_time()


@dataclass(frozen=True)
class Ratio:
    """A measured ratio of two systems.

    Attributes
    ----------
    name : str
        What is compared with what.
    value : float
        The ratio.
    target : float or None
        The target, or None if there is none.
    at_least : bool
        Whether the target is a minimum, as for speeds, rather than a maximum, as for times.
    """

    name: str
    value: float
    target: float | None = None
    at_least: bool = False

    @property
    def misses_target(self) -> bool:
        """Whether it misses its target."""
        if self.target is None:
            return False
        return self.value < self.target if self.at_least else self.value > self.target

    def __str__(self) -> str:
        """Name, value and target."""
        bound = "at least" if self.at_least else "at most"
        return f"{self.name} {self.value:.2f}" + (f" ({bound} {self.target})" if self.target else "")


def summary(ratios: Sequence[Ratio]) -> str:
    """Return a benchmark's last line: the number of ratios, and those that miss their target."""
    targets = sum(ratio.target is not None for ratio in ratios)
    missed = [str(ratio) for ratio in ratios if ratio.misses_target]
    return f"{len(ratios)} ratios measured, {targets} with a target; targets missed: {len(missed)}" + (
        f": {'; '.join(missed)}" if missed else ""
    )


def best_times(
    systems: Mapping[str, Callable[[int], object]],
    *,
    clock: Clock = Clock.WALL,
    rounds: int = 5,
    most_calls: int = 64,
    seconds: float = 0.06,
    settle: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Return the best seconds per call of each system, timed alternately.

    Parameters
    ----------
    systems : mapping
        Functions to call by name; they receive the number of the call, from 0.
    clock : Clock
        The clock.
    rounds : int
        Number of rounds; the best counts.
    most_calls : int
        Maximum number of calls per round.
    seconds : float
        Approximate duration of a system's calls in a round.
    settle : callable
        Synchronizes with the device, before and after each timing.
    """
    slowest = 0.0
    for call in systems.values():
        settle()
        started = clock.now()
        call(0)
        settle()
        slowest = max(slowest, clock.now() - started)
    calls = max(1, min(most_calls, int(seconds / max(slowest, 1e-6))))
    best = dict.fromkeys(systems, float("inf"))
    for turn in range(rounds):
        for name, call in systems.items():
            settle()
            started = clock.now()
            for number in range(1 + turn * calls, 1 + (turn + 1) * calls):
                call(number)
            settle()
            best[name] = min(best[name], (clock.now() - started) / calls)
    return best
