"""Eviction policies: which chunks leave when a bank is over its capacity."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from memlong.bank.arrays import Ids
from memlong.errors import InvalidArgumentError, UnknownNameError


@dataclass(frozen=True, eq=False)
class Usage:
    """How each chunk of a bank was used, oldest chunk first; a policy gets views that it cannot write to.

    Attributes
    ----------
    ids : numpy.ndarray
        int64 [n], ascending; ids grow with time, so this is the order of age.
    retrievals : numpy.ndarray
        int64 [n], how many times a query has retrieved the chunk.
    last_used : numpy.ndarray
        int64 [n], the bank's clock when the chunk was last added or retrieved; the clock ticks once per call.
    """

    ids: Ids
    retrievals: Ids
    last_used: Ids

    def __len__(self) -> int:
        return len(self.ids)


class EvictionPolicy(ABC):
    """Chooses from their usage which chunks must go; it keeps no state between calls.

    A policy that a plugin registers is made without arguments, and its `name` is the one it is registered under.
    """

    name: ClassVar[str]

    @abstractmethod
    def select(self, usage: Usage, capacity: int) -> Ids:
        """Choose the chunks to evict.

        Parameters
        ----------
        usage : Usage
            More than `capacity` chunks, oldest first.
        capacity : int
            How many chunks may stay, >= 0.

        Returns
        -------
        numpy.ndarray
            int64 ids from `usage.ids`, each once, at least ``len(usage) - capacity`` of them.
        """


class Fifo(EvictionPolicy):
    """Evict the oldest chunks, no more than needed."""

    name = "fifo"

    def select(self, usage: Usage, capacity: int) -> Ids:
        """Choose the oldest."""
        return usage.ids[: len(usage) - capacity]


class Lru(EvictionPolicy):
    """Evict the least recently used chunks, no more than needed; an add is a use, and age breaks ties."""

    name = "lru"

    def select(self, usage: Usage, capacity: int) -> Ids:
        """Choose the least recently used."""
        order = np.argsort(usage.last_used, kind="stable")
        return usage.ids[order[: len(usage) - capacity]]


class RetrievalFrequency(EvictionPolicy):
    """The dynamic memory update of MemLong (arXiv 2408.16967): forget what is old or seldom retrieved.

    On overflow the oldest 10 % of the chunks are dropped and the newest 10 % protected; of those between, the least
    retrieved go first (of equals, the older), until no more than half of the capacity is in use. Survivors keep their
    counts.

    Shares are rounded up, so at least the newest chunk is protected, and at least one chunk stays where the
    capacity allows one. If the protected chunks alone exceed the capacity, which takes a single add of about
    ten times the capacity, the oldest of them go too.
    """

    name = "retrieval_frequency"

    def select(self, usage: Usage, capacity: int) -> Ids:
        """Choose the oldest, then the least retrieved."""
        total = len(usage)
        tenth = math.ceil(total / 10)
        target = max(min(capacity, 1), capacity // 2)
        oldest = usage.ids[:tenth]
        middle = slice(tenth, max(total - tenth, tenth))
        by_count = np.argsort(usage.retrievals[middle], kind="stable")
        seldom = usage.ids[middle][by_count[: max(total - tenth - target, 0)]]
        chosen = np.concatenate([oldest, seldom])
        surplus = total - len(chosen) - capacity
        if surplus > 0:
            chosen = np.concatenate([chosen, usage.ids[max(total - tenth, tenth) :][:surplus]])
        return chosen


POLICIES: tuple[type[EvictionPolicy], ...] = (Fifo, Lru, RetrievalFrequency)


def saved_name(policy: EvictionPolicy) -> str | None:
    """Return the name that makes a policy of this class again; None if the class has none of its own."""
    name = vars(type(policy)).get("name")
    if not isinstance(name, str) or (
        type(policy) not in POLICIES and name in {each.name for each in POLICIES}
    ):
        return None
    return name


def eviction_policy(policy: str | EvictionPolicy) -> EvictionPolicy:
    """Return the policy of a name; an instance is returned unchanged.

    Parameters
    ----------
    policy : str or EvictionPolicy
        "fifo", "lru", "retrieval_frequency", or a policy of your own.

    Raises
    ------
    UnknownNameError
        If no policy has the name; the message lists those that exist.
    InvalidArgumentError
        If `policy` is neither a name nor an instance.
    """
    if isinstance(policy, EvictionPolicy):
        return policy
    if not isinstance(policy, str):
        raise InvalidArgumentError(
            f"eviction must be the name of a policy or an EvictionPolicy instance, got {policy!r}"
        )
    known = {each.name: each for each in POLICIES}
    if policy in known:
        return known[policy]()
    close = difflib.get_close_matches(policy, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UnknownNameError(f"no eviction policy is called {policy!r}.{hint} There are: {', '.join(known)}")
