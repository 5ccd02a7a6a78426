"""A bank's capacity, and which chunks are evicted when it is exceeded."""

from __future__ import annotations

import numpy as np

from memlong.bank.arrays import Ids
from memlong.bank.eviction import EvictionPolicy, Usage
from memlong.bank.sizes import byte_count
from memlong.bank.validate import whole_number
from memlong.errors import InvalidArgumentError

_MOST = 2**64


class Capacity:
    """Limits in chunks and bytes, enforced by an eviction policy.

    Parameters
    ----------
    max_chunks : int or None
        Maximum number of chunks; None means no limit.
    max_bytes : int, str or None
        Maximum bytes of embeddings, keys and values, such as 2000000 or "8GB".
    policy : EvictionPolicy
        Chooses which chunks leave.
    """

    def __init__(self, max_chunks: int | None, max_bytes: int | str | None, policy: EvictionPolicy) -> None:
        # The limit of a manifest.
        self.max_chunks = (
            None if max_chunks is None else whole_number("max_chunks", max_chunks, at_least=1, at_most=_MOST)
        )
        self.max_bytes = (
            None if max_bytes is None else byte_count("max_bytes", max_bytes, at_least=1, at_most=_MOST)
        )
        self.policy = policy

    def in_chunks(self, embedding_bytes: int, block_bytes: int, store_bytes: int | None) -> int | None:
        """Return how many chunks fit, None for any number.

        Parameters
        ----------
        embedding_bytes, block_bytes : int
            Of one chunk: its embedding, and its keys and values as the store keeps them.
        store_bytes : int or None
            Maximum bytes of keys and values in the store.

        Raises
        ------
        InvalidArgumentError
            If not even one does.
        """
        limits = [] if self.max_chunks is None else [self.max_chunks]
        chunk_bytes = embedding_bytes + block_bytes
        if self.max_bytes is not None:
            limits.append(self.max_bytes // chunk_bytes)
            if not limits[-1]:
                raise InvalidArgumentError(
                    f"max_bytes is {self.max_bytes}, but one chunk takes {chunk_bytes} bytes (embedding, keys, "
                    "values): the bank could never hold any; raise max_bytes"
                )
        if store_bytes is not None:
            limits.append(store_bytes // block_bytes)
            if not limits[-1]:
                raise InvalidArgumentError(
                    f"the store's farthest tier has a budget of {store_bytes} bytes, but the keys and values of "
                    f"one chunk take {block_bytes}: it could never hold any; raise the budget"
                )
        return min(limits, default=None)

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
        places = np.searchsorted(usage.ids, chosen)
        strangers = chosen[usage.ids[np.minimum(places, len(usage) - 1)] != chosen]
        if len(strangers) or len(usage) - len(chosen) > chunks:
            raise InvalidArgumentError(
                f"eviction policy {type(self.policy).__name__} must choose at least {len(usage) - chunks} "
                f"of {len(usage)} chunks in use, but chose {len(chosen)} (unknown: {strangers.tolist()[:9]})"
            )
        return chosen
