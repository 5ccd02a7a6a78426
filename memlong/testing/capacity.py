"""The contract of capacity and eviction."""

from __future__ import annotations

import pytest
import torch

from memlong.errors import InvalidArgumentError, UnknownNameError
from memlong.testing.harness import (
    DIM,
    BankSuite,
    assert_same_state,
    random_chunks,
    state_of,
    whatever_the_options,
)


class CapacityTests(BankSuite):
    """How a bank stays within its limits."""

    def test_chunks_over_capacity_are_evicted(self) -> None:
        """`add` stores first, then evicts; evicted chunks are never found."""
        bank, chunks = self.filled(8, max_chunks=10)
        assert random_chunks(5, seed=1, first=8).into(bank).tolist() == [8, 9, 10, 11, 12]
        assert bank.ids.tolist() == list(range(3, 13))
        found = bank.search(chunks.embeddings, 13)
        assert all(sorted(row[:10]) == list(range(3, 13)) for row in found.ids.tolist())

    def test_one_add_may_exceed_the_capacity(self) -> None:
        """Under fifo, the newest chunks remain."""
        bank, _ = self.filled(25, max_chunks=10)
        assert bank.ids.tolist() == list(range(15, 25))

    def test_bytes_limit_the_chunks(self) -> None:
        """`max_bytes` counts embeddings, keys and values."""
        one = 4 * DIM + 2 * random_chunks(1).keys.nbytes
        bank, _ = self.filled(9, max_bytes=4 * one + 1)
        assert bank.ids.tolist() == [5, 6, 7, 8]
        assert bank.nbytes == 4 * one

    def test_the_tighter_limit_counts(self) -> None:
        """With both limits, the one reached first applies."""
        one = 4 * DIM + 2 * random_chunks(1).keys.nbytes
        assert len(self.filled(9, max_bytes=4 * one, max_chunks=3)[0]) == 3
        assert len(self.filled(9, max_bytes=4 * one, max_chunks=7)[0]) == 4

    @whatever_the_options
    def test_too_few_bytes_for_one_chunk_is_an_error(self) -> None:
        """The first `add` raises and changes nothing."""
        bank = self.make(max_bytes=100)
        before = state_of(bank)
        with pytest.raises(InvalidArgumentError, match="max_bytes is 100, but one chunk takes"):
            random_chunks(1).into(bank)
        assert_same_state(before, bank)

    def test_evict_removes_what_the_policy_chooses(self) -> None:
        """`evict(n)` removes n chunks under fifo, all if there are fewer, and returns their ids."""
        bank, _ = self.filled(6)
        assert bank.evict(2).tolist() == [0, 1]
        assert bank.evict(0).tolist() == []
        assert bank.ids.tolist() == [2, 3, 4, 5]
        assert bank.evict(9).tolist() == [2, 3, 4, 5]
        assert len(bank) == 0

    def test_least_recently_used_leaves_first(self) -> None:
        """Under lru, a retrieved chunk outlives newer ones that were not retrieved."""
        bank, chunks = self.filled(4, max_chunks=4, eviction="lru")
        bank.retrieve(chunks.embeddings[:1], 1)
        random_chunks(2, seed=1, first=4).into(bank)
        assert bank.ids.tolist() == [0, 3, 4, 5]

    def test_rarely_retrieved_leaves_first(self) -> None:
        """Under retrieval_frequency, overflow keeps half: the newest and the most retrieved."""
        bank, chunks = self.filled(20, max_chunks=20, eviction="retrieval_frequency")
        bank.retrieve(chunks.embeddings[[5, 5, 7, 0]], 1)
        random_chunks(1, seed=1, first=20).into(bank)
        assert bank.ids.tolist() == [5, 7, *range(13, 21)]
        assert bank.usage.retrievals.tolist() == [2, 1, *[0] * 8]

    @whatever_the_options
    @pytest.mark.parametrize("name", ["max_chunks", "max_bytes"])
    @pytest.mark.parametrize("value", [0, -1, 2.5, True, "many", 10**30, pytest.param(10**5000, id="huge")])
    def test_limits_must_be_positive_ints(self, name: str, value: object) -> None:
        """A limit that is not a positive int, or too large for a snapshot, is an error that names it."""
        with pytest.raises(
            InvalidArgumentError, match=f"{name} must be (an integer|a size in bytes) .*, got"
        ):
            self.make(**{name: value})

    @whatever_the_options
    def test_a_misspelled_policy_is_corrected(self) -> None:
        """An unknown policy is an error that suggests the closest and lists all."""
        with pytest.raises(UnknownNameError, match=r"Did you mean 'fifo'\?.*lru"):
            self.make(eviction="fiffo")

    @whatever_the_options
    @pytest.mark.parametrize("n", [-1, 1.5, None])
    def test_evict_takes_a_count(self, n: object) -> None:
        """A count that is not an integer of at least 0 is an error."""
        bank, _ = self.filled(3)
        before = state_of(bank)
        with pytest.raises(InvalidArgumentError, match="n must be an integer of at least 0"):
            bank.evict(n)  # type: ignore[arg-type]
        assert_same_state(before, bank)

    def test_evicted_blocks_leave_the_store(self) -> None:
        """Keys and values of evicted chunks are freed."""
        bank, chunks = self.filled(30, max_chunks=10)
        assert bank.nbytes == 10 * (4 * DIM + 2 * chunks.keys[0].nbytes)
        got = bank.retrieve(chunks.embeddings[-5:], 1)
        assert torch.equal(got.keys[:, 0], chunks.keys[got.ids[:, 0]])
