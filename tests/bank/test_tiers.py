"""TieredStore: the same blocks back from any tier, budgets kept, and nothing left behind."""

from __future__ import annotations

import errno
import gc
import threading

import pytest
import torch

from memlong.bank import ChunkLayout, InMemoryStore, TieredStore
from memlong.bank.store.disk import DiskSlots
from memlong.bank.store.tier import TensorTier
from memlong.errors import InvalidArgumentError, StorageError
from memlong.plugins import Registry

SHAPE = (3, 2, 4, 8)
BLOCK = 2 * 3 * 2 * 4 * 8 * 4


def blocks(count, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, *SHAPE, generator=generator).to(dtype) for _ in range(2)]


@pytest.fixture(
    params=[
        "device",
        "host",
        "disk",
        "device-disk",
        "host-disk",
        "disk-budget",
        "objects",
        "memory-objects",
        "host-objects",
    ]
)
def tiers(request, tmp_path):
    return {
        "device": {"device": "all"},
        "host": {"host": "all"},
        "disk": {"disk": tmp_path},
        "device-disk": {"device": 2 * BLOCK, "disk": tmp_path},
        "host-disk": {"host": 0, "disk": str(tmp_path)},
        "disk-budget": {"host": "1MB", "disk": tmp_path, "disk_budget": "1GiB"},
        "objects": {"objects": tmp_path},
        "memory-objects": {"objects": f"memory://{tmp_path.name}", "readers": 2},
        "host-objects": {"host": 2 * BLOCK, "objects": f"file://{tmp_path}"},
    }[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_come_back_bit_by_bit_in_any_order(tiers, dtype):
    store, plain = TieredStore(**tiers), InMemoryStore()
    keys, values = blocks(7, dtype)
    for each in (store, plain):
        each.put(range(7), keys, values)
        each.remove([2, 5])
        each.put([9], keys[:1], values[:1])
    for ids in ([0], [6, 1, 9], [3, 3, 0], [4, 1, 0, 6, 9, 3], [0]):
        for found, expected in zip(store.get(ids), plain.get(ids), strict=True):
            assert torch.equal(found, expected)
            assert found.dtype == dtype
    assert len(store) == len(plain) == 6
    assert store.nbytes == plain.nbytes
    assert 2 not in store
    assert 9 in store


def test_what_comes_back_is_a_copy(tiers):
    store = TieredStore(**tiers)
    keys, values = blocks(2)
    store.put([0, 1], keys, values)
    store.get([0])[0].zero_()
    assert torch.equal(store.get([0])[0], keys[:1])


def test_ids_that_are_not_held_and_ids_held_already_are_refused(tiers):
    store = TieredStore(**tiers)
    with pytest.raises(InvalidArgumentError, match="no block for ids"):
        store.get([0])
    store.put([0, 1], *blocks(2))
    with pytest.raises(InvalidArgumentError, match=r"no block for ids \[5\]"):
        store.get([1, 5])
    with pytest.raises(InvalidArgumentError, match=r"no block for ids \[5\]"):
        store.remove([0, 5])
    with pytest.raises(InvalidArgumentError, match=r"already holds ids \[1\]"):
        store.put([1, 2], *blocks(2))
    assert len(store) == 2
    store.clear()
    assert len(store) == store.nbytes == 0
    store.put([0], *blocks(1, torch.bfloat16))  # and a layout of its own


@pytest.mark.parametrize(
    ("dtype", "tolerance", "share"), [("bfloat16", 0.01, 0.5), ("float8", 0.07, 0.5), ("int8", 0.012, 0.5)]
)
@pytest.mark.parametrize("tier", ["disk", "objects"])
def test_fewer_bits_cost_little(tmp_path, tier, dtype, tolerance, share):
    store = TieredStore(**{tier: tmp_path}, dtype=dtype)
    shape = (2, 2, 64, 64)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, *shape, generator=generator) for _ in range(2))
    keys[..., 3] *= 50  # a channel of outliers, as keys have them
    values[0, 0, 0, 0] = 0.0
    store.put([0, 1], keys, values)
    for found, given in zip(store.get([0, 1]), (keys, values), strict=True):
        error = (found - given).square().mean(dim=(0, 1, 2, 3)).sqrt()
        assert bool((error <= tolerance * given.square().mean(dim=(0, 1, 2, 3)).sqrt()).all())
    assert store.nbytes <= share * 1.06 * (keys.nbytes + values.nbytes)
    zeros = torch.zeros(1, *shape)
    store.put([5], zeros, zeros)
    assert torch.equal(store.get([5])[0], zeros)


@pytest.mark.parametrize("dtype", ["float8", "int8"])
def test_eight_bits_hold_a_block_of_an_odd_number_of_numbers(dtype):
    store = TieredStore(host="all", dtype=dtype)
    keys = torch.arange(15.0).view(1, 1, 1, 3, 5)
    store.put([0], keys, keys + 1)
    for found, given in zip(store.get([0]), (keys, keys + 1), strict=True):
        torch.testing.assert_close(found, given, atol=0.1, rtol=0.07)


@pytest.mark.parametrize("dtype", ["float8", "int8"])
def test_eight_bits_of_huge_numbers_stay_finite(dtype):
    store = TieredStore(host="all", dtype=dtype)
    store.put([0], *[torch.full((1, 1, 1, 2, 2), 1e30)] * 2)
    for found in store.get([0]):
        assert bool(found.isfinite().all())
        assert float(found.min()) > 1e6


def test_near_tiers_keep_to_their_budget_and_hold_what_was_wanted_lately(tmp_path):
    store = TieredStore(host=2 * BLOCK, disk=tmp_path)
    store.put(range(5), *blocks(5))
    assert list(store._near[0]._records) == [3, 4]
    store.get([0])
    assert list(store._near[0]._records) == [4, 0]
    store.get([4, 1])
    assert list(store._near[0]._records) == [4, 1]


def test_what_is_in_memory_is_counted_with_its_copies_and_what_is_on_disk_is_not(tmp_path):
    keys, values = blocks(4)
    one = keys[0].nbytes + values[0].nbytes
    for options, resident in (
        ({"host": "all"}, 4),
        ({"disk": tmp_path}, 0),
        ({"host": 3 * one, "disk": tmp_path}, 3),
        ({"objects": tmp_path}, 0),
        ({"host": 3 * one, "objects": tmp_path}, 3),
    ):
        store = TieredStore(**options)
        assert store.resident_bytes == 0
        store.put(range(4), keys, values)
        assert (store.nbytes, store.resident_bytes) == (4 * one, resident * one)


@pytest.mark.parametrize("tier", ["disk", "objects"])
def test_a_peek_leaves_near_tiers_to_those_that_search(tmp_path, tier):
    store = TieredStore(**{tier: tmp_path}, host=2 * BLOCK, readers=4)
    keys, values = blocks(6)
    store.put(range(6), keys, values)
    store.get([1, 3])
    near = list(store._near[0]._records)
    seen = [(one.clone(), other.clone()) for one, other in store.peek(range(6))]
    assert list(store._near[0]._records) == near == [1, 3]
    assert torch.equal(torch.stack([one for one, _ in seen]), keys)
    assert torch.equal(torch.stack([other for _, other in seen]), values)


@pytest.mark.parametrize("backend", ["torch", "faiss", "hnswlib"])
def test_the_farthest_tiers_budget_is_the_banks_capacity(tmp_path, backend):
    store = TieredStore(host=BLOCK, disk=tmp_path, disk_budget=3 * BLOCK)
    bank = Registry().create_bank(backend, 4, store=store)
    for seed in range(6):
        bank.add(torch.eye(4)[:1] + seed, *blocks(1, seed=seed), [(seed, seed + 1)])
    assert bank.ids.tolist() == [3, 4, 5]
    found = bank.retrieve(torch.ones(1, 4), 3)
    assert torch.equal(found.keys[0], bank.fetch(found.ids[0]).keys)


def test_a_budget_smaller_than_one_chunk_is_refused(tmp_path):
    bank = Registry().create_bank("torch", 4, store=TieredStore(disk=tmp_path, disk_budget=BLOCK - 1))
    with pytest.raises(InvalidArgumentError, match=f"budget of {BLOCK - 1} bytes, .* chunk take {BLOCK}"):
        bank.add(torch.eye(4)[:1], *blocks(1), [(0, 1)])
    assert len(bank) == 0


def test_nothing_is_left_in_the_folder(tmp_path):
    store = TieredStore(disk=tmp_path)
    store.put(range(3), *blocks(3))
    assert list(tmp_path.iterdir()) == []  # not even while it is in use
    del store
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_the_file_shrinks_and_slots_are_used_again(tmp_path):
    slots = DiskSlots(tmp_path, 10)
    records = torch.arange(60, dtype=torch.uint8).view(6, 10)
    assert slots.write(records) == [0, 1, 2, 3, 4, 5]
    slots.release([1, 4, 5])
    assert slots._file.seek(0, 2) == 40
    assert sorted(slots.write(records[:2])) == [1, 4]
    found = torch.zeros(2, 10, dtype=torch.uint8)
    for slot, target in zip([3, 0], found, strict=True):
        slots.read_into(slot, target)
    assert torch.equal(found, records[[3, 0]])
    slots.close()


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path, monkeypatch):
    store = TieredStore(host=BLOCK, disk=tmp_path)
    bank = Registry().create_bank("torch", 4, store=store)
    bank.add(torch.eye(4), *blocks(4), [(i, i + 1) for i in range(4)])
    write, calls = DiskSlots._write_at, []

    def full(slots, slot, record):
        calls.append(slot)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(slots, slot, record)

    monkeypatch.setattr(DiskSlots, "_write_at", full)
    with pytest.raises(
        StorageError, match=r"cannot take another .* No space left on device. Nothing was stored"
    ):
        bank.add(torch.eye(4), *blocks(4, seed=1), [(i, i + 1) for i in range(4)])
    monkeypatch.undo()
    assert bank.ids.tolist() == [0, 1, 2, 3]
    assert torch.equal(bank.fetch([2]).keys, blocks(4)[0][2:3])
    bank.add(torch.eye(4)[:1], *blocks(1, seed=1), [(9, 10)])
    assert torch.equal(bank.fetch([4]).keys, blocks(1, seed=1)[0])


def test_an_interrupt_while_copies_are_made_leaves_nothing_behind(tmp_path, monkeypatch):
    bank = Registry().create_bank("torch", 4, store=TieredStore(host="1MB", disk=tmp_path))
    bank.add(torch.eye(4)[:1], *blocks(1), [(0, 1)])

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TieredStore, "_keep_near", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bank.add(torch.eye(4)[:2], *blocks(2, seed=1), [(1, 2), (2, 3)])
    monkeypatch.undo()
    assert len(bank) == len(bank.state.store) == 1
    assert bank.add(torch.eye(4)[:1], *blocks(1, seed=2), [(1, 2)]).tolist() == [1]
    assert torch.equal(bank.fetch([1]).keys, blocks(1, seed=2)[0])


def test_a_file_that_cannot_be_cut_is_told_and_nothing_is_removed(tmp_path, monkeypatch):
    store = TieredStore(host=BLOCK, disk=tmp_path)
    keys, values = blocks(4)
    store.put(range(4), keys, values)

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(DiskSlots, "_shrink", refuse)
    with pytest.raises(
        StorageError, match=r"cannot give space back: Input/output error. Nothing was removed"
    ):
        store.remove([1, 3])
    monkeypatch.undo()
    assert torch.equal(store.get(range(4))[0], keys)
    store.put([4], keys[:1], values[:1])
    assert torch.equal(store.get([1, 3])[0], keys[[1, 3]])
    store.remove([1, 3])
    assert len(store) == 3


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    store = TieredStore(disk=tmp_path)
    store.put([0], *blocks(1))
    store._whole._slots.close()

    class Broken:
        def fileno(self):
            raise OSError(errno.EIO, "Input/output error")

        seek = fileno

    store._whole._slots._file = Broken()
    with pytest.raises(StorageError, match="cannot be read: Input/output error"):
        store.get([0])


@pytest.mark.parametrize(
    ("tier", "options"),
    [
        ("device", {"device": BLOCK - 1, "disk": "."}),
        ("host", {"host": BLOCK - 1}),
        ("host", {"host": BLOCK - 1, "disk": "."}),
        ("disk_budget", {"host": BLOCK, "disk": ".", "disk_budget": BLOCK - 1}),
    ],
)
def test_a_layout_that_a_tier_can_never_hold_is_refused_before_the_first_chunk(
    tier, options, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    layout = ChunkLayout.of(blocks(1)[0])
    bank = Registry().create_bank("torch", 4, store=TieredStore(**options))
    with pytest.raises(
        InvalidArgumentError, match=f"^{tier} must be at least {BLOCK} bytes, .*, got {BLOCK - 1}"
    ):
        bank.check_layout(layout)
    wider = {name: given if name == "disk" else BLOCK for name, given in options.items()}
    Registry().create_bank("torch", 4, store=TieredStore(**wider)).check_layout(layout)


def test_a_layout_that_the_bank_can_never_hold_is_refused():
    layout = ChunkLayout.of(blocks(1)[0])
    Registry().create_bank("torch", 4, max_bytes=BLOCK + 16).check_layout(layout)
    with pytest.raises(
        InvalidArgumentError, match=f"max_bytes is {BLOCK + 15}, but one chunk takes {BLOCK + 16}"
    ):
        Registry().create_bank("torch", 4, max_bytes=BLOCK + 15).check_layout(layout)


def test_a_block_on_a_cuda_device_is_kept_until_the_stream_that_reads_it_has(monkeypatch):
    class Record:
        is_cuda, device = True, "cuda:0"

        def record_stream(self, stream):
            read_on.append(stream)

    read_on, tier = [], TensorTier(None, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    tier._records[0] = Record()
    tier.get([0])
    assert read_on == ["stream of cuda:0"]


def test_a_second_layout_and_an_id_twice_are_refused(tiers):
    store = TieredStore(**tiers)
    store.put([0], *blocks(1))
    with pytest.raises(
        InvalidArgumentError, match=r"chunk dtype of the bank's first add, torch.float32, got torch.bfloat16"
    ):
        store.put([1], *blocks(1, torch.bfloat16))
    with pytest.raises(InvalidArgumentError, match="never reused"):
        store.put([1, 1], *blocks(2))
    assert len(store) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for folder in (tmp_path / "missing", file):
        with pytest.raises(StorageError, match=f"cannot write to the folder '{folder}'"):
            TieredStore(disk=folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "must have at least one of"),
        ({"host": "much"}, "host must be a size in bytes of at least 0, such as .*, got 'much'"),
        ({"device": -1}, "device must be a size in bytes of at least 0, .*, got -1"),
        ({"host": "1XB"}, "host must be a size in bytes .*, got '1XB'"),
        ({"host": "1GB", "disk_budget": "1GB"}, "disk_budget needs a folder"),
        ({"host": "9" * 400 + "GB"}, "host must be a size in bytes .*, got '999"),
        ({"disk": 5}, "disk must be the path of a folder, got 5"),
        ({"disk": ""}, "disk must be the path of a folder, got ''"),
        ({"objects": 5}, "objects must be a folder, or a URI .* got 5"),
        ({"objects": "nope://x"}, "that fsspec knows, .* got 'nope://x'"),
        ({"objects": ".", "readers": 0}, "readers must be an integer of at least 1, got 0"),
        ({"objects": ".", "disk": "."}, "disk and objects cannot be combined"),
        (
            {"host": "1GB", "dtype": "int4"},
            "dtype must be one of bfloat16, float8, int8",
        ),
    ],
)
def test_arguments_that_cannot_be_used_are_named(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        TieredStore(**options)


@pytest.mark.parametrize("tier", ["disk", "objects"])
def test_many_threads_may_read(tmp_path, tier):
    store = TieredStore(**{tier: tmp_path}, host=3 * BLOCK)
    keys, values = blocks(20)
    store.put(range(20), keys, values)
    wrong = []

    def read(seed):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(seed)).tolist()
        for start in range(0, 20, 4):
            ids = order[start : start + 4]
            if not torch.equal(store.get(ids)[0], keys[ids]):
                wrong.append(ids)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
