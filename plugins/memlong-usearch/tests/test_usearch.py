"""The usearch bank and plugin meet the shared contracts; further tests cover what is specific to this index."""

from __future__ import annotations

import pytest
import torch

from memlong import Registry
from memlong.bank import bank_of
from memlong.errors import DeviceUnavailableError, InvalidArgumentError
from memlong.testing import BackendPluginTests, MemoryBankTests
from memlong_usearch.index import UsearchIndex

UsearchBank = bank_of(UsearchIndex)

OPTIONS = ["connectivity", "expansion_add", "expansion_search"]


class TestUsearch(MemoryBankTests):
    index_class = UsearchIndex
    options = {"expansion_search": 96}


class TestPlugin(BackendPluginTests):
    backend = "usearch"
    options = {"connectivity": 24}


def fill(bank: UsearchBank, embeddings: torch.Tensor) -> torch.Tensor:
    count = len(embeddings)
    blocks = torch.ones(count, 1, 1, 1, 1)
    return bank.add(embeddings, blocks, blocks, torch.tensor([[0, 1]]).repeat(count, 1))


def random_vectors(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_the_plugin_offers_the_backend():
    registry = Registry()
    assert registry.load_backend_class("usearch") is UsearchBank
    report = registry.manager.owner(registry.backend("usearch"))
    assert (report.distribution, report.conflicts) == ("memlong-usearch", ())


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("value", [0, 2.0, True, "many"])
def test_options_are_checked(option, value):
    with pytest.raises(InvalidArgumentError, match=f"{option} must be an integer from "):
        UsearchBank(8, **{option: value})


@pytest.mark.parametrize("option", OPTIONS)
def test_options_have_an_upper_bound(option):
    with pytest.raises(InvalidArgumentError, match=f"{option} must be an integer from . to .*, got 100000"):
        UsearchBank(8, **{option: 10**14})


@pytest.mark.parametrize("option", OPTIONS)
def test_options_reach_the_graph(option):
    assert getattr(UsearchBank(8, **{option: 37}).index._graph, option) == 37


def test_only_the_cpu_will_do():
    with pytest.raises(DeviceUnavailableError, match="UsearchIndex cannot compute on cuda; it can on: cpu"):
        UsearchBank(8, device="cuda")


@pytest.mark.parametrize("queries", [1, 3])
def test_what_the_graph_does_not_find_is_no_candidate(queries):
    bank = UsearchBank(8)
    fill(bank, random_vectors(20, 8))
    bank.index._graph.remove([0, 4, 5])
    candidates = bank.index.search(random_vectors(queries, 8, seed=1).numpy(), 20)
    found = set(range(20)) - {0, 4, 5}
    assert [set(row) - {-1} for row in candidates.tolist()] == [found] * queries


def test_chunks_that_have_left_make_room():
    bank = UsearchBank(8)
    fill(bank, random_vectors(60, 8))
    nodes = bank.index._graph.stats.nodes
    for seed in range(5):
        bank.remove(bank.ids[:30])
        fill(bank, random_vectors(30, 8, seed=seed))
    assert len(bank.index._graph) == 60
    assert bank.index._graph.stats.nodes <= nodes + 30


def test_recall_stays_while_chunks_come_and_go():
    bank = UsearchBank(32, max_chunks=600)
    for seed in range(30):
        fill(bank, random_vectors(200, 32, seed=seed))
    queries = random_vectors(100, 32, seed=99)
    true, found = bank.exact_search(queries, 10), bank.search(queries, 10)
    assert (found.scores >= true.scores[:, -1:]).float().mean() >= 0.95


def test_building_is_reproducible():
    vectors, queries = random_vectors(600, 32), random_vectors(30, 32, seed=1)
    banks = [UsearchBank(32, connectivity=4, expansion_search=10) for _ in range(2)]
    for bank in banks:
        fill(bank, vectors)
    first, second = (bank.search(queries, 10) for bank in banks)
    assert torch.equal(first.ids, second.ids)


def test_a_saved_graph_is_used_again_and_searched_with_the_same_effort(tmp_path, monkeypatch):
    bank = UsearchBank(8, connectivity=7, expansion_add=33, expansion_search=21)
    fill(bank, random_vectors(50, 8))
    bank.save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(UsearchIndex, "add", None)  # rebuilding it would fail
        loaded = UsearchBank.load(tmp_path, trust_index=True)
        found = loaded.search(random_vectors(2, 8, seed=1), 5)
    assert torch.equal(found.ids, bank.search(random_vectors(2, 8, seed=1), 5).ids)
    assert [getattr(loaded.index._graph, option) for option in OPTIONS] == [7, 33, 21]


@pytest.mark.parametrize(
    ("facts", "chunks", "why"),
    [({"library": "0.1"}, 20, "usearch 0.1"), ({}, 19, "other chunks"), ({}, 21, "other chunks")],
)
def test_a_graph_that_does_not_fit_is_refused(facts, chunks, why):
    bank, other = UsearchBank(8), UsearchBank(8)
    fill(bank, random_vectors(20, 8))
    fill(other, random_vectors(chunks, 8))
    saved, content = other.index.dump()
    with pytest.raises(ValueError, match=why):
        bank.index.load({**saved, **facts}, content)
    assert len(bank.index._graph) == 20
