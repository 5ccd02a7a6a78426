"""How much a bank may hold, and who leaves when it holds more."""

from __future__ import annotations

import numpy as np

from memlong.bank.arrays import Ids
from memlong.bank.eviction import EvictionPolicy, Usage
from memlong.bank.validate import whole_number
from memlong.errors import InvalidArgumentError


class Capacity:
    """Limits in chunks and bytes, enforced by an eviction policy.

    Parameters
    ----------
    max_chunks, max_bytes : int or None
        The most chunks, and the most bytes of embeddings, keys and values; None is no limit.
    policy : EvictionPolicy
        Chooses who leaves.
    """

    def __init__(self, max_chunks: int | None, max_bytes: int | None, policy: EvictionPolicy) -> None:
        self.max_chunks = None if max_chunks is None else whole_number("max_chunks", max_chunks, at_least=1)
        self.max_bytes = None if max_bytes is None else whole_number("max_bytes", max_bytes, at_least=1)
        self.policy = policy

    def in_chunks(self, chunk_bytes: int) -> int | None:
        """Return how many chunks of `chunk_bytes` bytes fit, None for any number.

        Raises
        ------
        InvalidArgumentError
            If not even one does.
        """
        if self.max_bytes is None:
            return self.max_chunks
        by_bytes = self.max_bytes // chunk_bytes
        if not by_bytes:
            raise InvalidArgumentError(
                f"max_bytes is {self.max_bytes}, but one chunk takes {chunk_bytes} bytes (embedding, keys, "
                "values): the bank could never hold any; raise max_bytes"
            )
        return by_bytes if self.max_chunks is None else min(by_bytes, self.max_chunks)

    def victims(self, usage: Usage, chunks: int | None) -> Ids:
        """Return the ids, ascending, that must leave so that at most `chunks` stay.

        Raises
        ------
        InvalidArgumentError
            If the policy names ids that are not in use, or too few.
        """
        if chunks is None or len(usage) <= chunks:
            return np.empty(0, dtype=np.int64)
        chosen = np.unique(np.asarray(self.policy.select(usage, chunks), dtype=np.int64))
        strangers = np.setdiff1d(chosen, usage.ids)
        if len(strangers) or len(usage) - len(chosen) > chunks:
            raise InvalidArgumentError(
                f"eviction policy {type(self.policy).__name__} must choose at least {len(usage) - chunks} "
                f"of {len(usage)} chunks in use, but chose {len(chosen)} (unknown: {strangers.tolist()[:9]})"
            )
        return chosen
