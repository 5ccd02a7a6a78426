"""Indexes on a GPU share one object of FAISS's resources, with little memory of its own."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import pytest
import torch

from memlong.errors import DeviceUnavailableError

faiss = pytest.importorskip("faiss")

from memlong.bank import bank_of  # noqa: E402 - its library first
from memlong_faiss.index import FaissIndex  # noqa: E402 - its library first

FaissBank = bank_of(FaissIndex)


@pytest.fixture
def made(fake_gpu, monkeypatch):
    """The resources made so far; two GPUs are there."""
    found = []

    class Resources:
        def __init__(self):
            self.temporary = self.pinned = None
            found.append(self)

        def setTempMemory(self, size):  # noqa: N802 - FAISS's name
            self.temporary = size

        def setPinnedMemory(self, size):  # noqa: N802
            self.pinned = size

    gc.collect()  # banks of other tests
    monkeypatch.setattr(faiss, "StandardGpuResources", Resources, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    yield found
    found.clear()
    gc.collect()


@pytest.mark.slow
def test_they_are_made_at_first_use_and_once_for_all_banks_and_rebuilt_indexes(made, fill):
    banks = [FaissBank(8, device="cuda") for _ in range(3)]
    assert made == []
    for bank in banks:
        fill(bank, torch.randn(60, 8))
        bank.remove(range(30))  # more than a fifth: the index is rebuilt
        assert (bank.search(torch.randn(2, 8), 5).ids >= 30).all()
    assert len(made) == 1
    assert made[0].temporary == 64 << 20
    assert made[0].pinned == 0


@pytest.mark.slow
def test_each_gpu_has_its_own(made, fill):
    banks = [FaissBank(8, device=device) for device in ("cuda:0", "cuda:1", "cuda")]
    for bank in banks:
        fill(bank, torch.randn(9, 8))
    assert len(made) == 2


@pytest.mark.slow
def test_they_go_with_the_last_bank(made, fill):
    for _ in range(2):
        bank = FaissBank(8, device="cuda")
        fill(bank, torch.randn(9, 8))
        del bank
        gc.collect()
    assert len(made) == 2


@pytest.mark.slow
def test_an_index_is_given_up_only_when_no_other_is_in_use(made, fill):
    banks = [FaissBank(8, device="cuda") for _ in range(2)]
    for bank in banks:
        fill(bank, torch.randn(9, 8))
    gone = threading.Event()
    index = banks[0].index._native._index[0]
    weakref.finalize(index, gone.set)
    del index
    letting_go = threading.Thread(target=banks[0].reset)
    with banks[1].index._gpu.using():
        letting_go.start()
        assert not gone.wait(0.2)
    assert gone.wait(10)
    letting_go.join(10)


@pytest.mark.slow
def test_a_forked_process_is_refused_and_makes_its_own(made, fill, monkeypatch):
    before, after = FaissBank(8, device="cuda"), FaissBank(8, device="cuda")
    fill(before, torch.randn(9, 8))
    owner = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: owner + 1)
    with pytest.raises(DeviceUnavailableError, match=r"before this process was forked.*'spawn'"):
        before.search(torch.randn(1, 8), 2)
    fill(after, torch.randn(9, 8))
    assert after.search(torch.randn(1, 8), 2).ids.shape == (1, 2)
    assert len(made) == 2
