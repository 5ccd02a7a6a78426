"""What prompts have in common at their beginning is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shared:
    """Prompts that begin alike.

    Attributes
    ----------
    prefix
        The tokens that are read once.
    prompts
        Indices of the prompts.
    """

    prefix: tuple[int, ...]
    prompts: tuple[int, ...]


def one_by_one(prompts: Sequence[Sequence[int]]) -> list[Shared]:
    """Return a group for each prompt, all of which but the last token is read first."""
    return [Shared(tuple(prompt[:-1]), (number,)) for number, prompt in enumerate(prompts)]


def shared_prefixes(prompts: Sequence[Sequence[int]]) -> list[Shared]:
    """Group prompts so that little has to be read.

    A prefix is at least half of each of its prompts, and every prompt has at least one token after it.

    Examples
    --------
    >>> shared_prefixes([[1, 2, 3], [1, 2, 4], [5]])
    [Shared(prefix=(1, 2), prompts=(0, 1)), Shared(prefix=(), prompts=(2,))]
    """
    order = sorted(range(len(prompts)), key=lambda number: tuple(prompts[number]))
    groups = []
    while order:
        first = prompts[order[0]]
        length = len(first) - 1  # alone
        best, most, count, longest = length, 0, 1, len(first)
        for others, number in enumerate(order[1:], 1):
            this = prompts[number]
            length = min(_alike(first, this, length), len(this) - 1)
            longest = max(longest, len(this))
            if 2 * length < longest:
                break
            if others * length > most:
                best, most, count = length, others * length, others + 1
        groups.append(Shared(tuple(first[:best]), tuple(order[:count])))
        order = order[count:]
    return groups


def _alike(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """Return how many of the first ``most`` tokens are the same."""
    for place, (left, right) in enumerate(zip(one[:most], other[:most], strict=False)):
        if left != right:
            return place
    return min(most, len(other))
