"""A bank is copied and pickled as a value: its content, and nothing of its resources."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from memlong import BankPool, create_bank, load_bank
from memlong.bank import Draft, EvictionPolicy, TieredStore
from memlong.errors import MemlongError, SnapshotError

COPIES = [copy.copy, copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))]  # noqa: S301 - our own
BANKS = {
    "torch": ("torch", {"metric": "l2"}),
    "faiss": ("faiss", {"index": "HNSW16"}),
    "hnswlib": ("hnswlib", {"M": 8}),
}


@pytest.fixture
def chunks():
    generator = torch.Generator().manual_seed(0)

    def make(count, start=0):
        embeddings = torch.randn(count, 6, generator=generator)
        keys, values = torch.randn(2, count, 1, 2, 4, 3, generator=generator)
        return embeddings, keys, values, [[start + 4 * at, start + 4 * at + 4] for at in range(count)]

    return make


def assert_same(mine, theirs):
    for name, each in vars(mine).items():
        assert (each == vars(theirs)[name]).all()


@pytest.mark.parametrize("act", COPIES, ids=["copy", "deepcopy", "pickle"])
@pytest.mark.parametrize("name", BANKS)
@pytest.mark.parametrize("tiered", [False, True], ids=["device", "disk"])
def test_a_copy_holds_the_same_and_goes_its_own_way(chunks, tmp_path, act, name, tiered):
    backend, options = BANKS[name]
    store = {"store": TieredStore(disk=tmp_path)} if tiered else {}
    bank = create_bank(backend, 6, max_chunks=12, eviction="lru", **options, **store)
    bank.origin = {"model": "it"}
    bank.add(*chunks(14))
    queries = torch.randn(3, 6)
    bank.retrieve(queries, 2)
    bank.save(tmp_path / "saved")
    expected = bank.retrieve(queries, 5)
    other = act(bank)
    assert type(other) is type(bank)
    assert (other.next_id, other.origin) == (14, {"model": "it"})
    assert_same(other.usage, bank.usage)
    assert_same(other.fetch(bank.ids), bank.fetch(bank.ids))
    assert_same(other.retrieve(queries, 5), expected)
    other.add(*chunks(3, 100))
    assert (len(other), other.next_id) == (12, 17)
    assert bank.next_id == 14
    bank.remove(bank.ids[:2])
    assert len(other) == 12
    bank.save(tmp_path / "saved")  # as if nothing had been copied
    assert len(load_bank(tmp_path / "saved")) == 10


class Newest(EvictionPolicy):
    """Lets the newest go."""

    def select(self, usage, capacity):
        return usage.ids[capacity:]


def test_a_policy_without_a_name_comes_along(chunks):
    bank = create_bank("torch", 6, max_chunks=3, eviction=Newest())
    bank.add(*chunks(3))
    other = copy.deepcopy(bank)
    other.add(*chunks(1, 50))
    assert other.ids.tolist() == bank.ids.tolist() == [0, 1, 2]


def test_an_empty_bank_and_one_read_lazily_are_copied(chunks, tmp_path):
    empty = copy.deepcopy(create_bank("faiss", 6))
    assert len(empty) == 0
    empty.add(*chunks(5))
    empty.save(tmp_path / "bank")
    lazy = load_bank(tmp_path / "bank", lazy=True)
    other = copy.deepcopy(lazy)
    assert torch.equal(other.fetch([0, 4]).keys, empty.fetch([0, 4]).keys)
    assert other.open_files == 0


def nearest(bank, query):
    return bank.retrieve(query, 1).ids.tolist()


def test_a_spawned_process_gets_a_bank(chunks):
    bank = create_bank("torch", 6)
    bank.add(*chunks(5))
    query = bank.embeddings.embeddings[3:4]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as workers:
        assert workers.submit(nearest, bank, query).result() == [[3]]


@pytest.mark.parametrize("act", COPIES, ids=["copy", "deepcopy", "pickle"])
def test_what_belongs_to_something_else_says_what_to_copy(tmp_path, act):
    bank = create_bank("torch", 6)
    pool = BankPool(tmp_path, lambda: bank, load_bank, budget=10)
    for odd in (TieredStore(host="all"), Draft(bank), pool):
        with pytest.raises(
            MemlongError, match=rf"A {type(odd).__name__} cannot be copied or pickled: .*[^.]$"
        ):
            act(odd)
    pool.close()


def test_a_copy_keeps_all_chunks_of_a_store_of_fewer_bits(chunks):
    bank = create_bank("torch", 6, max_bytes=1500, store=TieredStore(host="all", dtype="int8"))
    bank.add(*chunks(40))
    held = len(bank)
    other = copy.deepcopy(bank)
    assert other.ids.tolist() == bank.ids.tolist()
    assert_same(other.fetch(bank.ids), bank.fetch(bank.ids))
    other.add(*chunks(1, 500))
    assert len(other) == held


def test_chunks_that_would_not_fit_without_their_store_are_not_dropped(chunks, tmp_path):
    store = {"host": "all", "dtype": "int8"}
    bank = create_bank("torch", 6, max_bytes=1500, store=TieredStore(**store))
    bank.add(*chunks(40))
    bank.save(tmp_path)
    same = {"max_bytes": 1500}
    for options in ({}, {"lazy": True}, same, {"max_chunks": 999}, {"max_chunks": None}, {"store": None}):
        with pytest.raises(SnapshotError, match=rf"holds {len(bank)} chunks, but only .* fit .*fewer bits"):
            load_bank(tmp_path, **options)
    assert len(load_bank(tmp_path, max_chunks=2)) == 2
    assert len(load_bank(tmp_path, store=TieredStore(**store))) == len(bank)
    assert len(load_bank(tmp_path, max_bytes=1400)) < len(bank)  # as it was asked for
    assert len(load_bank(tmp_path, max_bytes="1GB")) == len(bank)


def test_options_beyond_a_strangers_bounds_are_copied_and_trusted(chunks, tmp_path):
    bank = create_bank("hnswlib", 6, ef=10_000)
    bank.add(*chunks(9))
    assert copy.deepcopy(bank).index.options.ef == 10_000
    bank.save(tmp_path)
    with pytest.raises(SnapshotError, match="more than a file may ask for"):
        load_bank(tmp_path)
    assert load_bank(tmp_path, trust_index=True).index.options.ef == 10_000


class Named(Newest):
    name = "newest"


def test_a_policy_of_a_plugin_comes_along(chunks):
    bank = create_bank("torch", 6, max_chunks=3, eviction=Named())
    bank.add(*chunks(3))
    assert type(pickle.loads(pickle.dumps(bank)).state.capacity.policy) is Named  # noqa: S301 - our own
