"""The contract of failures: index and store change together, or not at all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from memlong.bank import InMemoryStore
from memlong.errors import InvalidArgumentError
from memlong.testing.harness import (
    BankSuite,
    assert_same_state,
    random_chunks,
    state_of,
    whatever_the_options,
)


class FailingStore(InMemoryStore):
    """A store that raises in the methods named in `failing`."""

    def __init__(self) -> None:
        super().__init__()
        self.failing: set[str] = set()

    def put(self, ids: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store, or raise."""
        self._trip("put")
        super().put(ids, keys, values)

    def remove(self, ids: Sequence[int]) -> None:
        """Remove, or raise."""
        self._trip("remove")
        super().remove(ids)

    def _trip(self, method: str) -> None:
        if method in self.failing:
            raise OSError(f"{method}: disk full")


class FaultTests(BankSuite):
    """The state of a bank after an error."""

    def test_a_store_that_fails_to_put_leaves_the_bank_as_it_was(self) -> None:
        """Nothing is added, and no id is used up."""
        store = FailingStore()
        bank, _ = self.filled(10, store=store)
        before = state_of(bank)
        store.failing = {"put"}
        with pytest.raises(OSError, match="disk full"):
            random_chunks(3, seed=1).into(bank)
        assert_same_state(before, bank)
        store.failing = set()
        assert random_chunks(2, seed=1).into(bank).tolist() == [10, 11]

    def test_a_store_that_fails_to_remove_leaves_the_bank_as_it_was(self) -> None:
        """Nothing is removed."""
        store = FailingStore()
        bank, _ = self.filled(10, store=store)
        before = state_of(bank)
        store.failing = {"remove"}
        with pytest.raises(OSError, match="disk full"):
            bank.remove([3])
        with pytest.raises(OSError, match="disk full"):
            bank.evict(3)
        assert_same_state(before, bank)

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_an_index_that_fails_to_add_leaves_the_bank_as_it_was(
        self, when: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whether or not the index added the chunks before it raised."""
        bank, chunks = self.filled(300)
        before = state_of(bank)
        add = bank.index.add

        def failing(*arguments: object) -> None:
            if when == "after":
                add(*arguments)  # type: ignore[arg-type]
            raise MemoryError("no room")

        with monkeypatch.context() as patch:
            patch.setattr(bank.index, "add", failing)
            with pytest.raises(MemoryError, match="no room"):
                random_chunks(3, seed=1).into(bank)
        assert_same_state(before, bank)
        assert random_chunks(2, seed=1, first=300).into(bank).tolist() == [300, 301]
        got = bank.retrieve(chunks.embeddings[:5], 302)
        assert (got.ids.sort(dim=1).values == torch.arange(302)).all()

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_an_index_that_fails_to_remove_leaves_the_bank_as_it_was(
        self, when: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing is removed; an `add` that would have evicted adds nothing either."""
        bank, _ = self.filled(10, max_chunks=10)
        before = state_of(bank)
        remove = bank.index.remove

        def failing(*arguments: object) -> None:
            if when == "after":
                remove(*arguments)  # type: ignore[arg-type]
            raise MemoryError("no room")

        with monkeypatch.context() as patch:
            patch.setattr(bank.index, "remove", failing)
            with pytest.raises(MemoryError, match="no room"):
                random_chunks(1, seed=1).into(bank)
        assert_same_state(before, bank)
        with monkeypatch.context() as patch:
            patch.setattr(bank.index, "remove", failing)
            with pytest.raises(MemoryError, match="no room"):
                bank.remove([4])
        assert_same_state(before, bank)

    @whatever_the_options
    def test_a_store_in_use_is_refused(self) -> None:
        """Two banks never share a store."""
        store = InMemoryStore()
        self.filled(2, store=store)
        with pytest.raises(InvalidArgumentError, match="store must be empty, got one of 2 blocks"):
            self.make(store=store)
