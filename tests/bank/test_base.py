"""What the base does for an index that is careless, late or wrong."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from memlong.bank import Draft, Index, bank_of


class CarelessIndex(Index):
    """Names what it is told to name, and writes down what happens to it."""

    def __init__(self, rows, options):
        super().__init__(rows, options)
        self.log, self.names = [], lambda queries, k: np.empty((len(queries), 0), np.int64)
        self.is_good = True

    def add(self, ids, embeddings):
        self.log.append(("add", ids.tolist(), len(embeddings), len(self.rows)))

    def search(self, queries, k):
        self.log.append(("search", len(queries), k))
        return self.names(queries, k)

    def remove(self, ids):
        self.log.append(("remove", ids.tolist(), len(self.rows)))
        return self.is_good

    def reset(self):
        self.log.append(("reset",))


Careless = bank_of(CarelessIndex)


@pytest.fixture
def bank():
    made = Careless(4)
    made.index.log.clear()
    blocks = torch.ones(6, 1, 1, 1, 1)
    made.add(torch.randn(6, 4), blocks, blocks, [[0, 1]] * 6)
    return made


def test_the_mean_embedding_is_of_some_that_are_evenly_spaced(bank):
    torch.testing.assert_close(bank.mean_embedding(), bank.embeddings.embeddings.mean(dim=0))
    bank.remove(range(6))
    assert bank.mean_embedding().tolist() == [0] * 4
    blocks = torch.ones(3000, 1, 1, 1, 1)
    bank.add(torch.arange(12000.0).view(3000, 4), blocks, blocks, [[0, 1]] * 3000)
    torch.testing.assert_close(bank.mean_embedding(), bank.embeddings.embeddings[::3].mean(dim=0))


@pytest.mark.parametrize("stored", [0, 6, 1000, 3001])
@pytest.mark.parametrize("drafted", [1, 5, 1023])
def test_a_draft_has_the_mean_that_the_bank_would_have(stored, drafted):
    vectors = torch.randn(stored + drafted, 4, generator=torch.Generator().manual_seed(0))
    blocks, spans = torch.ones(len(vectors), 1, 1, 1, 1), [[0, 1]] * len(vectors)
    bank, whole = Careless(4), Careless(4)
    bank.add(vectors[:stored], blocks[:stored], blocks[:stored], spans[:stored])
    whole.add(vectors, blocks, blocks, spans)
    draft = Draft(bank)
    draft.add(vectors[stored:], blocks[stored:], blocks[stored:], spans[stored:])
    torch.testing.assert_close(draft.mean_embedding(), whole.mean_embedding())


def test_the_table_holds_the_ids_that_an_index_is_given(bank):
    bank.remove([2, 4])
    bank.search(torch.randn(2, 4), 9)
    bank.reset()
    assert bank.index.log == [
        ("add", list(range(6)), 6, 6),
        ("remove", [2, 4], 6),
        ("search", 2, 4),
        ("reset",),
    ]


@pytest.mark.parametrize(
    "names",
    [
        lambda queries, k: np.empty((len(queries), 0), np.int64),
        lambda queries, k: np.full((len(queries), 7), -1),
        lambda queries, k: np.tile([3, 3, 3, 3, 77, -1], (len(queries), 1)),
    ],
)
def test_what_an_index_fails_to_name_is_found_by_brute_force(bank, names):
    bank.index.names = names
    queries = torch.randn(3, 4)
    found, true = bank.search(queries, 4), bank.exact_search(queries, 4)
    assert torch.equal(found.ids, true.ids)
    assert torch.equal(found.scores, true.scores)


def test_an_error_of_an_index_in_a_search_reaches_the_caller_and_changes_nothing(bank):
    def fails(_queries, _k):
        raise RuntimeError("fewer than k")

    query = torch.randn(1, 4)
    before = bank.exact_search(query, 3)
    bank.index.names = fails
    with pytest.raises(RuntimeError, match="fewer than k"):
        bank.search(query, 3)
    bank.index.names = lambda queries, k: np.arange(6)[None]
    assert torch.equal(bank.search(query, 3).ids, before.ids)
    assert ("reset",) not in bank.index.log  # nor is the index rebuilt


@pytest.mark.parametrize("answer", [False, np.False_])
def test_an_index_that_asks_for_it_is_rebuilt_once_before_the_next_search(bank, answer):
    bank.index.is_good = answer
    bank.remove([0])
    bank.index.log.clear()
    blocks = torch.ones(1, 1, 1, 1, 1)
    bank.add(torch.randn(1, 4), blocks, blocks, [[0, 1]])
    bank.remove([1])
    assert not bank.index.log
    for _ in range(2):
        bank.search(torch.randn(1, 4), 1)
    assert bank.index.log == [("reset",), ("add", [2, 3, 4, 5, 6], 5, 5), ("search", 1, 1), ("search", 1, 1)]


def test_an_empty_bank_does_not_ask_its_index():
    bank = Careless(4)
    bank.search(torch.randn(2, 4), 3)
    assert bank.index.log == [("reset",)]


def test_it_says_what_it_is(bank):
    assert repr(bank) == "CarelessBank(dim=4, metric='cosine', chunks=6)"
    assert (bank.dim, bank.metric, bank.device) == (4, "cosine", torch.device("cpu"))


@pytest.mark.slow
def test_the_package_loads_no_index_library_and_no_transformers():
    code = "import sys, memlong.bank; print({'faiss', 'hnswlib', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
