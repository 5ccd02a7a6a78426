"""The contract of the index by itself: the base makes up for what an index does not find, and so would hide it."""

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

_SEAMS = ("_index_add", "_index_search", "_index_remove")
_ODDMENTS = 4096  # bytes that have nothing to do with chunks


class IndexTests(BankSuite):
    """What the index names, before the base scores it and searches again by brute force where too few are named."""

    @pytest.mark.parametrize("queries", [1, 4])
    def test_candidates_are_int64_rows_of_ids(self, queries: int) -> None:
        """`_index_search` returns an int64 array with one row a query, for one query and for many."""
        bank, _ = self.filled(100)
        named = candidates(bank, random_vectors(queries, seed=1), 7)
        assert isinstance(named, np.ndarray)
        assert (str(named.dtype), named.ndim, len(named)) == ("int64", 2, queries)

    @pytest.mark.parametrize("metric", METRICS)
    def test_the_index_itself_finds_the_best(self, metric: str) -> None:
        """Without the base's brute force, candidates hold at least `recall_floor` of the true best ten."""
        bank, _ = self.filled(600, metric=metric)
        assert_found(index_recall(bank, random_vectors(50, seed=1)), self.recall_floor)

    def test_what_has_left_takes_no_places(self) -> None:
        """Candidates reach the floor when several times as many chunks have left as are held.

        An index may go on naming what has left, but not in place of what is held.
        """
        bank = self.make(max_chunks=600)
        for turn in range(20):
            bank.remove(bank.ids[1::5])
            random_chunks(150, seed=turn, first=150 * turn).into(bank)
        assert_found(index_recall(bank, random_vectors(50, seed=99)), self.recall_floor)

    def test_what_has_left_takes_no_memory(self) -> None:
        """A full index stops growing, however many chunks come and leave: it forgets them, or is rebuilt."""
        bank, sizes = self.make(max_chunks=300), []
        empty = self.index_bytes(bank)
        for turn in range(24):
            random_chunks(150, seed=turn, first=150 * turn).into(bank)
            bank.search(random_vectors(1), 1)  # so that the index is current
            sizes.append(self.index_bytes(bank) - empty)
        if max(sizes) < 8 * 300:
            pytest.skip("Python sees no copy of the chunks in this index; `index_bytes` can be overridden")
        early, late = max(sizes[:8]), max(sizes[8:])
        assert late <= 2 * early + _ODDMENTS, (
            f"the index of a bank of 300 chunks holds {early:,} bytes after 1,200 chunks and {late:,} after 3,600: it "
            "keeps what has left. Remove it, or rebuild now and then: self._drop_index()"
        )

    def test_arrays_are_lent_for_the_call_alone(self) -> None:
        """The index keeps copies of what it is given, and changes none of it."""
        bank = self.make()
        with _lending(bank):
            for turn, count in enumerate((200, 300, 100)):
                random_chunks(count, seed=turn, first=len(bank)).into(bank)
            bank.remove(bank.ids[::3])
            assert_found(index_recall(bank, random_vectors(50, seed=9)), self.recall_floor)

    def test_searches_side_by_side_find_what_they_find_alone(self) -> None:
        """The index names the best that it names alone: it keeps nothing that a search in another thread changes."""
        bank, _ = self.filled(600, metric="inner_product")  # whose queries the base passes on as they are
        bank.search(random_vectors(1), 1)  # so that the index is current
        queries = [random_vectors(8, seed=seed) for seed in range(4)]

        def named(number: int) -> Ids:
            return bank._index_search(queries[number].numpy(), 10)  # noqa: SLF001 - the seam under test

        def best_alone(number: int) -> list[Ids]:
            best = bank.exact_search(queries[number], 10).ids.numpy()
            return [row[np.isin(row, found)] for row, found in zip(best, named(number), strict=True)]

        alone = [best_alone(number) for number in range(len(queries))]

        def agreement(turn: int) -> float:
            number = turn % len(queries)
            return _share(alone[number], named(number))

        with _impatient(), ThreadPoolExecutor(len(queries)) as pool:
            worst = min(pool.map(agreement, range(200)))
        assert_found(worst, self.recall_floor, "beside others, a search names")

    def test_a_saved_index_holds_every_batch(self, tmp_path: Path) -> None:
        """An index that is saved after several adds and a removal names for each chunk that very one, once loaded."""
        bank, chunks = self.make(), random_chunks(320)
        for part in (slice(0, 200), slice(200, 300), slice(300, 320)):
            bank.add(*(each[part] for each in (chunks.embeddings, chunks.keys, chunks.values, chunks.spans)))
        bank.remove([3, 250])
        if bank._index_save() is None:  # noqa: SLF001 - the seam under test
            pytest.skip("this backend saves no index")
        bank.save(tmp_path)
        loaded = self.bank_class.load(tmp_path, trust_index=True)
        newest = torch.arange(300, 320)
        named = candidates(loaded, chunks.embeddings[newest], 1)
        assert_found(
            _share(newest[:, None].numpy(), named), self.recall_floor, "once loaded, the index names"
        )


def candidates(bank: MemoryBank, queries: torch.Tensor, k: int) -> Ids:
    """Search a bank, and return what its index named: int64 ids [q, c]."""
    search, named = bank._index_search, []  # noqa: SLF001 - the seam under test

    def noting(*arguments: Any) -> Ids:
        found = search(*arguments)
        named.append(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank, "_index_search", noting)
        bank.search(queries, k)
    return named[-1]


def index_recall(bank: MemoryBank, queries: torch.Tensor, k: int = 10) -> float:
    """Return the share of the true best k of each query that the index names among its candidates."""
    return _share(bank.exact_search(queries, k).ids.numpy(), candidates(bank, queries, k))


def _share(wanted: Iterable[Ids], named: Ids) -> float:
    return float(np.mean([np.isin(row, found).mean() for row, found in zip(wanted, named, strict=True)]))


@contextmanager
def _lending(bank: MemoryBank) -> Iterator[None]:
    """Spoil the arrays that the index gets as soon as it returns, and fail if it has changed them."""

    def lent_to(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            lent = [each.copy() if isinstance(each, np.ndarray) else each for each in arguments]
            found = method(*lent)
            found = found if found is None else found.copy()
            for own, given in zip(lent, arguments, strict=True):
                if isinstance(own, np.ndarray):
                    np.testing.assert_array_equal(own, given, "the index has changed what it was given")
                    own.fill(-1)
            return found

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in _SEAMS:
            patch.setattr(bank, name, lent_to(getattr(bank, name)))
        yield


@contextmanager
def _impatient() -> Iterator[None]:
    """Have threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
