"""The contract of the index by itself: the bank compensates for what an index misses, and so would hide it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memlong.bank import Ids, MemoryBank
from memlong.testing.harness import METRICS, BankSuite, assert_found, random_chunks, random_vectors

_SEAMS = ("add", "search", "remove")
_ODDMENTS = 4096  # bytes of slack, unrelated to chunks


class IndexTests(BankSuite):
    """The candidates of an index, before the bank scores them and falls back to brute force if there are too few."""

    @pytest.mark.parametrize("queries", [1, 4])
    def test_candidates_are_int64_rows_of_ids(self, queries: int) -> None:
        """`search` returns an int64 array with one row per query, for one query and for many."""
        bank, _ = self.filled(100)
        named = candidates(bank, random_vectors(queries, seed=1), 7)
        assert isinstance(named, np.ndarray)
        assert (str(named.dtype), named.ndim, len(named)) == ("int64", 2, queries)

    @pytest.mark.parametrize("metric", METRICS)
    def test_the_index_itself_finds_the_best(self, metric: str) -> None:
        """Without the bank's brute force, candidates contain at least `recall_floor` of the true best ten."""
        bank, _ = self.filled(600, metric=metric)
        assert_found(index_recall(bank, random_vectors(50, seed=1)), self.recall_floor)

    def test_removed_chunks_displace_no_candidates(self) -> None:
        """Candidates reach the floor even after several times as many chunks were removed as remain.

        An index may still return removed chunks, but not instead of present ones.
        """
        bank = self.make(max_chunks=600)
        for turn in range(20):
            bank.remove(bank.ids[1::5])
            random_chunks(150, seed=turn, first=150 * turn).into(bank)
        assert_found(index_recall(bank, random_vectors(50, seed=99)), self.recall_floor)

    def test_removed_chunks_take_no_memory(self) -> None:
        """A full index stops growing, however many chunks are added and evicted: it frees them, or is rebuilt."""
        bank, sizes = self.make(max_chunks=300), []
        empty = self.index_bytes(bank)
        for turn in range(24):
            random_chunks(150, seed=turn, first=150 * turn).into(bank)
            bank.search(random_vectors(1), 1)  # so that the index is up to date
            sizes.append(self.index_bytes(bank) - empty)
        if max(sizes) < 8 * 300:
            pytest.skip(
                "the index has no copy of the chunks that Python can see; override `index_bytes` to measure it"
            )
        early, late = max(sizes[:8]), max(sizes[8:])
        assert late <= 2 * early + _ODDMENTS, (
            f"the index of a bank of 300 chunks has {early:,} bytes after 1,200 chunks and {late:,} after 3,600: it "
            "keeps removed chunks. Free them, or return False from `remove` now and then to have the index rebuilt"
        )

    def test_arrays_are_only_valid_during_the_call(self) -> None:
        """The index copies what it keeps of its arguments, and does not modify them."""
        bank = self.make()
        with _lending(bank):
            for turn, count in enumerate((200, 300, 100)):
                random_chunks(count, seed=turn, first=len(bank)).into(bank)
            bank.remove(bank.ids[::3])
            assert_found(index_recall(bank, random_vectors(50, seed=9)), self.recall_floor)

    def test_concurrent_searches_find_what_they_find_alone(self) -> None:
        """Concurrent searches return what they return alone: the index has no state that searches share."""
        bank, _ = self.filled(600, metric="inner_product")  # the bank passes queries on unchanged
        bank.search(random_vectors(1), 1)  # so that the index is up to date
        queries = [random_vectors(8, seed=seed) for seed in range(4)]

        def named(number: int) -> Ids:
            return bank.index.search(queries[number].numpy(), 10)

        def best_alone(number: int) -> list[Ids]:
            best = bank.exact_search(queries[number], 10).ids.numpy()
            return [row[np.isin(row, found)] for row, found in zip(best, named(number), strict=True)]

        alone = [best_alone(number) for number in range(len(queries))]

        def agreement(turn: int) -> float:
            number = turn % len(queries)
            return _share(alone[number], named(number))

        with _impatient(), ThreadPoolExecutor(len(queries)) as pool:
            worst = min(pool.map(agreement, range(200)))
        assert_found(worst, self.recall_floor, "next to others, a search returns")

    def test_a_saved_index_holds_every_batch(self, tmp_path: Path) -> None:
        """After several adds and a removal, a saved and loaded index finds each chunk by its own embedding."""
        bank, chunks = self.make(), random_chunks(320)
        for part in (slice(0, 200), slice(200, 300), slice(300, 320)):
            bank.add(*(each[part] for each in (chunks.embeddings, chunks.keys, chunks.values, chunks.spans)))
        bank.remove([3, 250])
        if bank.index.dump() is None:
            pytest.skip("this backend does not save its index")
        bank.save(tmp_path)
        loaded = self.bank_class.load(tmp_path, trust_index=True)
        newest = torch.arange(300, 320)
        named = candidates(loaded, chunks.embeddings[newest], 1)
        assert_found(
            _share(newest[:, None].numpy(), named), self.recall_floor, "once loaded, the index returns"
        )


def candidates(bank: MemoryBank, queries: torch.Tensor, k: int) -> Ids:
    """Search a bank, and return the candidates of its index: int64 ids [q, c]."""
    search = bank.index.search
    named: list[Ids] = []

    def noting(*arguments: Any) -> Ids:
        found = search(*arguments)
        named.append(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank.index, "search", noting)
        bank.search(queries, k)
    return named[-1]


def index_recall(bank: MemoryBank, queries: torch.Tensor, k: int = 10) -> float:
    """Return the share of each query's true best k among the index's candidates."""
    return _share(bank.exact_search(queries, k).ids.numpy(), candidates(bank, queries, k))


def _share(wanted: Iterable[Ids], named: Ids) -> float:
    return float(np.mean([np.isin(row, found).mean() for row, found in zip(wanted, named, strict=True)]))


@contextmanager
def _lending(bank: MemoryBank) -> Iterator[None]:
    """Overwrite the arrays passed to the index as soon as it returns, and fail if it modified them."""

    def lent_to(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            lent = [each.copy() if isinstance(each, np.ndarray) else each for each in arguments]
            found = method(*lent)
            found = found.copy() if isinstance(found, np.ndarray) else found
            for own, given in zip(lent, arguments, strict=True):
                if isinstance(own, np.ndarray):
                    np.testing.assert_array_equal(own, given, "the index modified its arguments")
                    own.fill(-1)
            return found

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in _SEAMS:
            patch.setattr(bank.index, name, lent_to(getattr(bank.index, name)))
        yield


@contextmanager
def _impatient() -> Iterator[None]:
    """Make threads switch as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
