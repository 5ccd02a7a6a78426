"""The contract of adding, removing and resetting."""

from __future__ import annotations

import pytest
import torch

from memlong.bank import MemoryBank
from memlong.errors import InvalidArgumentError
from memlong.testing.harness import (
    BLOCK,
    DIM,
    BankSuite,
    assert_found,
    assert_same_state,
    random_chunks,
    random_vectors,
    state_of,
)


class LifecycleTests(BankSuite):
    """Adding, removing and resetting chunks."""

    def test_ids_ascend_from_zero(self) -> None:
        """Ids are int64 and count up over all adds."""
        bank = self.make()
        assert random_chunks(3).into(bank).tolist() == [0, 1, 2]
        ids = random_chunks(2, seed=1, first=3).into(bank)
        assert ids.tolist() == [3, 4]
        assert ids.dtype == torch.int64
        assert bank.ids.tolist() == [0, 1, 2, 3, 4]
        assert len(bank) == 5

    def test_ids_are_never_reused(self) -> None:
        """Ids are not reused after a removal, an eviction or a reset."""
        bank, _ = self.filled(6)
        bank.remove([5])
        bank.evict(1)
        assert random_chunks(1, seed=1).into(bank).tolist() == [6]
        bank.reset()
        assert random_chunks(1, seed=2).into(bank).tolist() == [7]

    def test_adding_nothing_is_fine(self) -> None:
        """Zero chunks give zero ids and leave the bank unchanged, whatever their shape."""
        bank, _ = self.filled(3)
        before = state_of(bank)
        empty = torch.empty(0, 1, 1, 1, 1)
        ids = bank.add(torch.empty(0, DIM), empty, empty, [])
        assert ids.shape == (0,)
        assert ids.dtype == torch.int64
        assert_same_state(before, bank)

    def test_growth_loses_nothing(self) -> None:
        """A bank grows beyond its initial capacity, and every chunk is still found with its K-V."""
        bank = self.make()
        sizes = (10, 700, 800)
        added = torch.cat([_grow(bank, size) for size in sizes])
        assert len(bank) == sum(sizes)
        got = bank.retrieve(added, 1)
        hits = (got.ids[:, 0] == torch.arange(sum(sizes))).float().mean().item()
        assert_found(hits, 1.0 if self.exact else self.recall_floor, "a search of each chunk finds")
        assert (got.keys == got.ids.view(-1, 1, 1, 1, 1, 1)).all()

    def test_removed_chunks_are_never_found(self) -> None:
        """Removed chunks are not found even if k exceeds the remaining ones, which stay."""
        bank, chunks = self.filled(30)
        gone = [0, 3, 4, 17, 29]
        bank.remove(torch.tensor(gone))
        assert len(bank) == 25
        found = bank.search(chunks.embeddings, 30)
        left = sorted(set(range(30)) - set(gone))
        assert all(sorted(row[:25]) == left for row in found.ids.tolist())
        assert (found.ids[:, 25:] == -1).all()

    def test_unknown_ids_are_named_and_nothing_is_removed(self) -> None:
        """A single unknown id makes the whole call fail."""
        bank, _ = self.filled(5)
        bank.remove([1])
        before = state_of(bank)
        with pytest.raises(InvalidArgumentError, match=r"\[1, 12\]"):
            bank.remove([0, 1, 12])
        assert_same_state(before, bank)

    def test_emptied_bank_can_be_filled_again(self) -> None:
        """A bank whose chunks were all removed works like a new one, except for its ids."""
        bank, _ = self.filled(12)
        bank.remove(bank.ids)
        assert len(bank) == 0
        assert bank.search(random_vectors(1), 2).ids.tolist() == [[-1, -1]]
        chunks = random_chunks(4, seed=2, first=12)
        chunks.into(bank)
        assert bank.search(chunks.embeddings, 1).ids[:, 0].tolist() == [12, 13, 14, 15]

    def test_many_rounds_of_adding_and_removing(self) -> None:
        """After long use, all present chunks are found, and no removed ones."""
        bank = self.make(max_chunks=60)
        for turn in range(20):
            chunks = random_chunks(15, seed=turn, first=15 * turn)
            chunks.into(bank)
            everything = bank.search(chunks.embeddings[:3], 60)
            present = set(bank.ids.tolist())
            assert all(set(row) - {-1} == present for row in everything.ids.tolist())
        assert bank.ids.tolist() == list(range(240, 300))
        got = bank.retrieve(chunks.embeddings, 1)
        assert (got.keys == got.ids.view(-1, 1, 1, 1, 1, 1)).all()

    def test_reset_forgets_everything_but_the_ids(self) -> None:
        """A reset bank is empty and accepts chunks of another shape and dtype."""
        bank, _ = self.filled(9)
        bank.reset()
        assert (len(bank), bank.nbytes, bank.ids.tolist()) == (0, 0, [])
        assert bank.search(random_vectors(1), 2).ids.tolist() == [[-1, -1]]
        other = torch.ones(1, 1, 1, 5, 2)
        bank.add(random_vectors(1), other, other, [[0, 5]])
        assert bank.retrieve(random_vectors(1), 1).keys.shape == (1, 1, 1, 1, 5, 2)

    def test_bytes_are_counted(self) -> None:
        """`nbytes` counts embeddings, keys and values."""
        bank, chunks = self.filled(7)
        one = 4 * DIM + 2 * chunks.keys[0].nbytes
        assert bank.nbytes == 7 * one
        bank.remove([2, 3])
        assert bank.nbytes == 5 * one

    def test_torch_modes_do_not_leak(self) -> None:
        """Chunks added in inference mode and under autocast can be used outside, and vice versa."""
        bank = self.make()
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            random_chunks(4).into(bank)
            inside = bank.retrieve(random_vectors(2, seed=1), 2)
        random_chunks(4, seed=1, first=4).into(bank)
        bank.remove([0])
        outside = bank.retrieve(random_vectors(2, seed=1), 2)
        weight = torch.ones(BLOCK, requires_grad=True)
        torch.autograd.grad((outside.keys * weight).sum(), weight)
        assert inside.scores.dtype == outside.scores.dtype == torch.float32
        assert (outside.keys == outside.ids.view(2, 2, 1, 1, 1, 1)).all()


def _grow(bank: MemoryBank, size: int) -> torch.Tensor:
    first = len(bank)
    chunks = random_chunks(size, seed=first, first=first)
    chunks.into(bank)
    return chunks.embeddings
