"""What the benchmarks share: systems timed in turns, ratios with their targets, and the line that sums them up."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Clock(StrEnum):
    """What time is told."""

    WALL = "wall"
    CPU = "cpu"

    def now(self) -> float:
        """Seconds by this clock."""
        return time.perf_counter() if self is Clock.WALL else time.process_time()


@dataclass(frozen=True)
class Ratio:
    """What was measured of something beside something else.

    Attributes
    ----------
    name : str
        Of what to what.
    value : float
        The ratio.
    target : float or None
        Where it is to be; None where nothing is asked of it.
    at_least : bool
        Whether the target is the least, as for speeds, and not the most, as for times.
    """

    name: str
    value: float
    target: float | None = None
    at_least: bool = False

    @property
    def is_beyond(self) -> bool:
        """Whether it has missed its target."""
        if self.target is None:
            return False
        return self.value < self.target if self.at_least else self.value > self.target

    def __str__(self) -> str:
        """Name, value and target."""
        bound = "at least" if self.at_least else "at most"
        return f"{self.name} {self.value:.2f}" + (f" ({bound} {self.target})" if self.target else "")


def summary(ratios: Sequence[Ratio]) -> str:
    """Return a benchmark's last line: how many ratios were measured, and which are beyond their target."""
    aimed = sum(ratio.target is not None for ratio in ratios)
    beyond = [str(ratio) for ratio in ratios if ratio.is_beyond]
    return f"{len(ratios)} ratios measured, {aimed} with a target; beyond their target: {len(beyond)}" + (
        f": {'; '.join(beyond)}" if beyond else ""
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
    """Return the best seconds a call of each system, all of which run in turns.

    Parameters
    ----------
    systems : mapping
        By name, what to call; it is given the number of the call, from 0.
    clock : Clock
        What time is told.
    rounds : int
        How many turns each has; the best counts.
    most_calls : int
        How many calls a turn has, at most.
    seconds : float
        About how long a turn is to take.
    settle : callable
        Waits until a device has done what it was told; before and at the end of what is timed.
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
