"""Slabs: slots that nobody loses, and copies in an order that no other copy disturbs."""

from __future__ import annotations

import gc

import pytest
import torch

from memlong.bank import TieredStore
from memlong.bank.store.slabs import Slabs, page_locked
from memlong.errors import StorageError

CPU = torch.device("cpu")
SHAPE = (2, 1, 4, 8)
BLOCK = 2 * 2 * 4 * 8 * 4


def records(*numbers):
    return [torch.full((16,), number, dtype=torch.uint8) for number in numbers]


def blocks(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, *SHAPE, generator=generator) for _ in range(2)]


def test_a_stream_reads_a_slot_only_after_the_one_that_wrote_it(stand_in):
    slabs, side = Slabs(16, CPU), stand_in.stream("side")
    slots = slabs.bring(records(1, 2))
    slabs.send(slots)
    assert stand_in.log == []  # a stream is in order with itself
    stand_in.current = side
    assert [row.tolist() for row in slabs.send(slots[:1])] == [[1] * 16]
    assert stand_in.log == [("side", "main:0")]
    stand_in.finish()
    slabs.send(slots)
    assert stand_in.log == [("side", "main:0")]


def test_the_host_reads_a_slot_only_after_the_stream_that_wrote_it(stand_in):
    slabs = Slabs(16, CPU)
    slots = slabs.bring(records(1, 2, 3))
    slabs.settle(slots)
    assert stand_in.log == [("host", "main:0")]
    slabs.settle(slots)
    assert stand_in.log == [("host", "main:0")]


def test_a_place_is_written_over_only_after_all_that_was_to_be_read_from_it(stand_in):
    slabs, main = Slabs(16, CPU), stand_in.current
    slots = slabs.bring(records(1))
    for name in ("one", "two"):
        stand_in.current = stand_in.stream(name)
        slabs.send(slots)
    stand_in.log.clear()
    del slots
    stand_in.current = main
    again = slabs.bring(records(2))
    assert stand_in.log == [("main", "one:1"), ("main", "two:2")]
    stand_in.log.clear()
    del again
    again = slabs.take(1)
    slabs.settle(again, writing=True)  # the host itself is about to write
    assert stand_in.log == [("host", "main:3"), ("host", "one:1"), ("host", "two:2")]


@pytest.mark.usefixtures("stand_in")
def test_a_slot_is_free_when_nobody_refers_to_it():
    slabs = Slabs(16, CPU, budget=4 * 16)
    slots = slabs.bring(records(0, 1, 2, 3))
    kept = slots[2]
    held = slabs.nbytes
    del slots
    fresh = slabs.bring(records(7, 8, 9))
    assert slabs.nbytes == held
    assert kept.record.tolist() == [2] * 16
    assert [slot.record[0].item() for slot in fresh] == [7, 8, 9]


@pytest.mark.usefixtures("stand_in")
def test_slabs_grow_like_the_whole_and_fill_the_powers_of_two_that_they_take():
    slabs = Slabs(24, CPU)
    held, sizes = [], []
    for _ in range(60):
        held += slabs.take(1)
        if not sizes or slabs.nbytes > sum(sizes):
            sizes.append(slabs.nbytes - sum(sizes))
    assert sizes == [1 * 24, 1 * 24, 2 * 24, 5 * 24, 10 * 24, 21 * 24, 42 * 24]


@pytest.mark.usefixtures("stand_in")
def test_a_slab_takes_at_most_256_megabytes():
    slabs, size = Slabs(40 << 20, CPU), 40 << 20
    held = slabs.take(4)
    assert slabs.nbytes == 6 * size
    held += slabs.take(2) + slabs.take(1)
    assert slabs.nbytes == 12 * size
    assert len(held) == 7


@pytest.mark.usefixtures("stand_in")
def test_there_are_no_more_slots_than_the_budget_has_records_unless_they_are_in_use():
    slabs = Slabs(16, CPU, budget=5 * 16 + 3)
    held = [slot for _ in range(5) for slot in slabs.take(1)]
    assert slabs.nbytes == 5 * 16
    held += slabs.take(2)
    assert slabs.nbytes == 7 * 16
    assert len(held) == 7


@pytest.mark.usefixtures("stand_in")
def test_free_slabs_are_given_back_but_for_the_smallest():
    slabs = Slabs(16, CPU)
    few, many = slabs.take(2), slabs.take(30)
    assert slabs.nbytes == (2 + 32) * 16
    slabs.tidy()
    assert slabs.nbytes == (2 + 32) * 16
    del many
    slabs.tidy()
    assert slabs.nbytes == (2 + 32) * 16  # there may be more to come
    del few
    slabs.tidy()
    assert slabs.nbytes == 2 * 16


def test_memory_that_cannot_be_page_locked_is_told(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(
        StorageError, match=r"another 64 bytes of page-locked .*out of memory.*smaller budget"
    ):
        page_locked(4, 16)


@pytest.mark.parametrize("tiers", ["host", "disk", "host-disk", "small-disk"])
def test_blocks_come_back_from_slots_bit_by_bit(tiers, stand_in, tmp_path):
    store = TieredStore(
        **{
            "host": {"host": "all"},
            "disk": {"disk": tmp_path},
            "host-disk": {"host": 3 * BLOCK, "disk": tmp_path},
            "small-disk": {"host": BLOCK, "disk": tmp_path},
        }[tiers]
    )
    keys, values = blocks(7)
    store.put(range(7), keys, values)
    store.remove([2, 5])
    store.put([9], keys[2:3], values[2:3])
    sources = {0: 0, 1: 1, 3: 3, 4: 4, 6: 6, 9: 2}
    for ids in ([0], [6, 1, 9], [3, 3, 0], [4, 1, 0, 6, 9, 3]):
        rows = [sources[chunk_id] for chunk_id in ids]
        for found, expected in zip(store.get(ids), (keys[rows], values[rows]), strict=True):
            assert torch.equal(found, expected)
    peeked = [one.clone() for one, _ in store.peek([4, 0, 9])]
    assert torch.equal(torch.stack(peeked), keys[[4, 0, 2]])


def test_only_a_store_that_reads_its_records_itself_waits_to_take_them_in(stand_in, tmp_path):
    for options, waits in (({"host": "all"}, 0), ({"host": "all", "disk": tmp_path}, 1)):
        stand_in.log.clear()
        TieredStore(**options).put(range(5), *blocks(5))
        assert len(stand_in.log) == waits


def test_what_was_read_from_the_disk_stays_near_as_it_was_read(stand_in, tmp_path, monkeypatch):
    store = TieredStore(host=2 * BLOCK, disk=tmp_path)
    keys, values = blocks(5)
    store.put(range(5), keys, values)
    monkeypatch.setattr(Slabs, "bring", None)  # nothing goes back to the host
    assert torch.equal(store.get([0, 1])[0], keys[:2])
    assert list(store._near[0]._records) == [0, 1]
    monkeypatch.setattr(store._whole._slots, "read_into", None)
    assert torch.equal(store.get([1, 0])[1], values[[1, 0]])


def test_no_memory_is_kept_for_blocks_that_have_left(stand_in, tmp_path):
    store = TieredStore(host="all")
    for number in range(40):
        store.put([number], *blocks(1, number))
    grown = store._slabs.nbytes
    assert grown >= 40 * BLOCK
    store.remove(range(40))
    assert store._slabs.nbytes == BLOCK
    store.clear()
    gc.collect()
    store.put([0], *blocks(1))
    assert store._slabs.nbytes == BLOCK


def test_an_interrupt_while_the_disk_is_read_loses_no_slot(stand_in, tmp_path, monkeypatch):
    store = TieredStore(host=BLOCK, disk=tmp_path)
    keys, values = blocks(4)
    store.put(range(4), keys, values)
    store.get([0, 1, 2, 3])
    held = store._slabs.nbytes

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store._whole._slots, "read_into", interrupt)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            store.get([0, 1, 2])
    monkeypatch.delattr(store._whole._slots, "read_into")
    assert torch.equal(store.get([2, 0])[0], keys[[2, 0]])
    assert store._slabs.nbytes == held
