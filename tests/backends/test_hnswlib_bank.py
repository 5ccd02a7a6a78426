"""What is particular to HnswlibBank."""

from __future__ import annotations

import os

import pytest
import torch

from memlong.bank import bank_of
from memlong.errors import DeviceUnavailableError, InvalidArgumentError, SnapshotError
from memlong_hnswlib.index import HnswlibIndex

HnswlibBank = bank_of(HnswlibIndex)


@pytest.mark.parametrize("option", ["ef", "ef_construction", "initial_capacity", "build_threads", "M"])
@pytest.mark.parametrize("value", [0, 2.0, "many"])
def test_options_are_checked(option, value):
    with pytest.raises(InvalidArgumentError, match=f"{option} must be an integer from "):
        HnswlibBank(8, **{option: value})


@pytest.mark.parametrize("option", ["ef", "ef_construction", "initial_capacity", "build_threads", "M"])
def test_options_have_an_upper_bound(option):
    with pytest.raises(InvalidArgumentError, match=f"{option} must be an integer from . to .*, got 100000"):
        HnswlibBank(8, **{option: 10**14})


def test_a_graph_that_no_memory_holds_is_refused_with_what_to_do(monkeypatch):
    class Full:
        def __init__(self, *_):
            pass

        def init_index(self, *_, **__):
            raise RuntimeError("Not enough memory")

    monkeypatch.setattr("memlong_hnswlib.index.hnswlib.Index", Full)
    with pytest.raises(InvalidArgumentError, match="cannot allocate a graph with initial_capacity 1024"):
        HnswlibBank(8)


def test_only_the_cpu_will_do():
    with pytest.raises(DeviceUnavailableError, match="HnswlibIndex cannot compute on cuda; it can on: cpu"):
        HnswlibBank(8, device="cuda")


def test_the_graph_doubles_when_it_is_full(fill):
    bank = HnswlibBank(8, initial_capacity=10)
    fill(bank, torch.randn(10, 8))
    assert bank.index._graph.max_elements == 10
    fill(bank, torch.randn(1, 8))
    assert bank.index._graph.max_elements == 20
    fill(bank, torch.randn(100, 8))
    assert bank.index._graph.max_elements == 111


def test_the_graph_is_rebuilt_once_a_third_is_dead(fill):
    bank = HnswlibBank(8)
    fill(bank, torch.randn(90, 8))
    bank.remove(range(30))
    bank.search(torch.randn(1, 8), 1)
    assert bank.index._graph.element_count == 90
    bank.remove([30])
    bank.search(torch.randn(1, 8), 1)
    assert bank.index._graph.element_count == 59


def test_a_graph_that_falls_short_is_made_up_for(fill):
    """With two links a chunk and no effort, parts of the graph are out of reach; all living still come back."""
    bank = HnswlibBank(8, M=2, ef_construction=1, ef=1)
    fill(bank, torch.randn(300, 8))
    bank.remove(range(0, 180, 2))
    found = bank.search(torch.randn(5, 8), 210)
    assert torch.equal(found.ids.sort(dim=1).values, bank.ids.expand(5, -1))
    assert bank.index._nearest(torch.randn(5, 8).numpy(), 210) is None


def test_other_errors_of_the_library_are_not_hidden(fill, monkeypatch):
    bank = HnswlibBank(8)
    fill(bank, torch.randn(3, 8))

    class Broken:
        def knn_query(self, *_, **__):
            raise RuntimeError("Index not loaded")

    monkeypatch.setattr(bank.index, "_graph", Broken())
    with pytest.raises(RuntimeError, match="not loaded"):
        bank.search(torch.randn(1, 8), 1)


def test_building_is_reproducible(fill):
    vectors, queries = torch.randn(600, 32), torch.randn(30, 32)
    banks = [HnswlibBank(32, M=4, ef=10) for _ in range(2)]
    for bank in banks:
        fill(bank, vectors)
    first, second = (bank.search(queries, 10) for bank in banks)
    assert torch.equal(first.ids, second.ids)


def test_a_disk_that_is_full_while_the_index_is_written_is_said(fill, tmp_path):
    bank = HnswlibBank(8)
    fill(bank, torch.randn(10, 8))
    graph = bank.index._graph

    class Cut:
        def save_index(self, path):
            graph.save_index(path)
            os.truncate(path, 100)

        def __getattr__(self, name):
            return getattr(graph, name)

    bank.index._graph = Cut()
    with pytest.raises(SnapshotError, match=r"hnswlib wrote only 100 of .* bytes"):
        bank.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
