"""An interrupt at any line leaves a bank that works."""

from __future__ import annotations

import errno
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import memlong.bank
from memlong.bank import InMemoryStore, TieredStore, bank_of
from memlong.bank.lock import ReadWriteLock
from memlong.bank.store.disk import DiskSlots
from memlong.errors import StorageError
from memlong_torch.index import TorchIndex

TorchBank = bank_of(TorchIndex)

FILES = {
    str(Path(memlong.bank.__file__).with_name(f"{name}.py"))
    for name in (
        *("base", "contents", "disk", "index", "lock", "records", "slabs", "store", "table", "tier", "tiers"),
        "traffic",
    )
}
SHAPE = (1, 1, 2, 2)
BLOCK = 2 * 4 * 4


@pytest.fixture
def interrupted(interrupting):
    """Interrupt a call before the line number `at` that it runs in the bank's files; False if it ends before."""
    return interrupting(FILES)


@pytest.fixture(params=["memory", "host-disk", "host-disk-in-slabs"])
def make(request, tmp_path):
    stores = {
        "memory": InMemoryStore,
        "host-disk": lambda: TieredStore(host=2 * BLOCK, disk=tmp_path),
    }
    stores["host-disk-in-slabs"] = stores["host-disk"]
    if request.param == "host-disk-in-slabs":
        request.getfixturevalue("stand_in")

    def made():
        bank = TorchBank(4, max_chunks=5, store=stores[request.param]())
        add(bank, 5)
        bank.search(torch.ones(1, 4), 2)
        return bank

    return made


def vectors(ids):
    return torch.stack([torch.tensor([1.0, i, i * i, 0.5]) for i in ids])


def add(bank, count):
    """Add chunks all of whose numbers are their id."""
    ids = range(bank.next_id, bank.next_id + count)
    blocks = torch.tensor(ids, dtype=torch.float32).view(-1, 1, 1, 1, 1).repeat(1, *SHAPE)
    return bank.add(vectors(ids), blocks, -blocks, [(i, i + 1) for i in ids])


CHANGES = {
    "add": lambda bank: add(bank, 2),
    "remove": lambda bank: bank.remove([1, 3]),
    "evict": lambda bank: bank.evict(2),
    "reset": lambda bank: bank.reset(),
}


def assert_it_works(bank):
    assert_it_is_whole(bank)
    first = bank.next_id
    assert add(bank, 2).tolist() == [first, first + 1]
    assert_it_is_whole(bank)
    assert_nothing_is_lost_sight_of(bank.state.store, set(bank.ids.tolist()))
    bank.remove([first])
    assert_it_is_whole(bank)


def assert_it_is_whole(bank):
    ids = bank.ids.tolist()
    assert len(bank) == len(ids) == len(bank.state.store)
    assert all(each in bank.state.store for each in ids)
    assert bank.nbytes == len(ids) * (BLOCK + 16)
    if not ids:
        return
    chunks = bank.fetch(ids)
    numbers = chunks.ids.view(-1, 1, 1, 1, 1).expand_as(chunks.keys)
    assert chunks.ids.tolist() == ids
    assert torch.equal(chunks.keys, numbers.float())
    assert torch.equal(chunks.values, -numbers.float())
    assert chunks.spans[:, 0].tolist() == ids
    assert bank.retrieve(vectors(ids), 1).ids[:, 0].tolist() == ids


def assert_nothing_is_lost_sight_of(store, ids):
    if isinstance(store, TieredStore):
        if (slot_of := getattr(store._whole, "_slot_of", None)) is not None:
            slots = store._whole._slots
            assert set(slot_of) == ids
            assert sorted([*slot_of.values(), *slots._free]) == list(range(slots._end))
        else:
            assert set(store._whole._records) == ids
        for tier in store._near:
            assert set(tier._records) <= ids
        if store._slabs is not None:
            store._slabs.tidy()
            in_use = sum(len(slab.traffic) - len(slab.free) for slab in store._slabs._slabs)
            assert in_use == sum(map(len, store._near))
            assert in_use == sum(len(slab.leases) for slab in store._slabs._slabs)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_at_any_line_of_a_change(interrupted, make, change):
    at = 0
    bank = make()
    while interrupted(lambda: CHANGES[change](bank), at):  # noqa: B023
        left = set(bank.ids.tolist())
        assert {5, 6} <= left or not {5, 6} & left, "chunks were added in part"
        if change in ("remove", "evict"):
            assert left >= ({0, 2, 4} if change == "remove" else {2, 3, 4})
        assert_it_works(bank)
        at += 1
        bank = make()
    assert at > 20


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a file that is just being opened
def test_at_any_line_of_the_first_add_a_bank_stays_empty_and_takes_another_layout(interrupted, tmp_path):
    at, bank = 0, TorchBank(4, store=TieredStore(host=BLOCK, disk=tmp_path))
    while interrupted(lambda: add(bank, 2), at):  # noqa: B023
        if not len(bank):
            assert bank.layout is None
            wide = torch.ones(1, 3, 3, 3, 3)
            bank.add(vectors([0]), wide, wide, [(0, 1)])
            assert torch.equal(bank.fetch(bank.ids).keys, wide)
        at, bank = at + 1, TorchBank(4, store=TieredStore(host=BLOCK, disk=tmp_path))
    assert at > 20


def test_at_any_line_of_undoing_an_add_for_which_the_disk_is_full(interrupted, tmp_path, monkeypatch):
    write = DiskSlots._write_at

    def full(slots, slot, record):
        if record.view("float32")[0] == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(slots, slot, record)

    at, more = 0, True
    while more:
        bank = TorchBank(4, max_chunks=5, store=TieredStore(host=2 * BLOCK, disk=tmp_path))
        add(bank, 5)
        with monkeypatch.context() as patch, suppress(StorageError):
            patch.setattr(DiskSlots, "_write_at", full)
            more = False
            more = interrupted(lambda: add(bank, 2), at)  # noqa: B023
        assert bank.ids.tolist() == [0, 1, 2, 3, 4]
        assert bank.next_id == 5
        assert_it_works(bank)
        at += 1
    assert at > 20


@pytest.mark.parametrize("kind", ["read", "write"])
def test_at_any_line_of_a_lock(interrupted, kind):
    def use():
        with getattr(lock, kind)():
            pass

    at, lock = 0, ReadWriteLock()
    while interrupted(use, at):
        for hold in (lock.write, lock.read):
            with hold():
                pass
        assert not lock._readers | lock._writers | lock._writers_waiting
        other = threading.Thread(target=use)
        other.start()
        other.join(10)
        assert not other.is_alive()
        at, lock = at + 1, ReadWriteLock()
    assert at > 5
