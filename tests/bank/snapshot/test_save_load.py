"""A bank that was saved and loaded is the bank that it was."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from memlong import SnapshotError, create_bank, load_bank
from memlong.bank import InMemoryStore, MemoryBank, TieredStore, bank_of
from memlong.bank.eviction import Fifo
from memlong.bank.snapshot import matrix
from memlong.bank.snapshot.tending import compact, verify
from memlong.errors import InvalidArgumentError, UnknownNameError
from memlong.testing.harness import (
    BLOCK,
    DIM,
    assert_same_state,
    random_chunks,
    random_vectors,
    state_of,
)
from memlong.testing.persistence import what_follows
from memlong_torch.index import TorchIndex


def assert_same_blocks(bank, other):
    ours, theirs = bank.fetch(bank.ids), other.fetch(bank.ids)
    for what in ("ids", "keys", "values", "spans"):
        assert torch.equal(getattr(ours, what), getattr(theirs, what))


def files(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("lazy", [False, True])
def test_everything_comes_back(make, backend, tmp_path, lazy):
    bank = make(backend, max_chunks=100, eviction="lru")
    bank.save(tmp_path / "bank")
    loaded = load_bank(tmp_path / "bank", lazy=lazy)
    assert type(loaded) is type(bank)
    assert_same_state(state_of(bank), loaded)
    assert loaded.usage.last_used.tolist() == bank.usage.last_used.tolist()
    assert (loaded.next_id, loaded.layout) == (bank.next_id, bank.layout)
    assert_same_blocks(bank, loaded)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_loaded_bank_goes_on_as_the_saved_one(make, backend, tmp_path, lazy):
    bank = make(backend, max_chunks=45, eviction="lru")
    bank.save(tmp_path / "bank")
    loaded = load_bank(tmp_path / "bank", lazy=lazy)
    for each in (bank, loaded):
        assert random_chunks(20, seed=9, first=40).into(each).tolist() == list(range(40, 60))
        each.remove(each.ids[[2, 30]])
    assert_same_state(state_of(bank), loaded)
    assert_same_blocks(bank, loaded)


@pytest.mark.parametrize("other", ["torch", "faiss", "hnswlib"])
def test_a_snapshot_of_one_backend_loads_into_another(make, backend, tmp_path, other):
    bank = make(backend)
    bank.save(tmp_path / "bank")
    loaded = load_bank(tmp_path / "bank", other)
    assert other in type(loaded).__module__
    assert_same_state(state_of(bank), loaded)
    assert_same_blocks(bank, loaded)


def test_the_file_of_the_index_is_read_where_it_is_trusted(make, tmp_path, monkeypatch):
    bank = make("hnswlib", chunks=300)
    bank.save(tmp_path / "bank")
    loaded = load_bank(tmp_path / "bank", trust_index=True)
    monkeypatch.setattr(loaded.index, "reset", None)  # no rebuilding
    assert_same_state(state_of(bank), loaded)


@pytest.mark.parametrize("options", [{"M": 8}, {"max_chunks": 20}])
def test_the_index_is_built_anew_where_its_file_does_not_fit(make, tmp_path, options):
    bank = make("hnswlib")
    bank.save(tmp_path / "bank")
    loaded = load_bank(tmp_path / "bank", trust_index=True, **options)
    found = loaded.search(random_vectors(2), 40)
    assert set(found.ids[0].tolist()) - {-1} == set(loaded.ids.tolist())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("lazy", [False, True])
def test_keys_and_values_keep_their_bits(tmp_path, dtype, lazy):
    bank, chunks = create_bank("torch", DIM), random_chunks(5)
    keys = torch.randn(5, *BLOCK).to(dtype)
    bank.add(chunks.embeddings, keys, keys, chunks.spans)
    bank.save(tmp_path)
    got = load_bank(tmp_path, lazy=lazy).fetch(range(5))
    assert got.keys.dtype == dtype
    assert torch.equal(got.keys.view(torch.uint8), keys.view(torch.uint8))


@pytest.mark.parametrize("state", ["new", "emptied", "reset"])
def test_a_bank_without_chunks(make, backend, tmp_path, state):
    bank = make(backend, chunks=0 if state == "new" else 9)
    if state == "emptied":
        bank.remove(bank.ids)
    elif state == "reset":
        bank.reset()
    bank.save(tmp_path)
    for trust_index in (False, True):
        loaded = load_bank(tmp_path, trust_index=trust_index)
        assert (len(loaded), loaded.next_id, loaded.layout) == (0, bank.next_id, bank.layout)
        assert loaded.search(random_vectors(1), 2).ids.tolist() == [[-1, -1]]


def test_saving_again_writes_what_is_new(make, tmp_path):
    bank = make(chunks=200)
    bank.save(tmp_path)
    before = files(tmp_path)
    random_chunks(2, seed=1, first=200).into(bank)
    bank.save(tmp_path)
    after = files(tmp_path)
    kept = {name for name in before if name.startswith(("blocks", "chunks"))}
    assert {name: after.get(name) for name in kept} == {name: before[name] for name in kept}
    new = [tmp_path / name for name in after if name not in before and name.startswith("blocks")]
    assert len(new) == 1
    assert new[0].stat().st_size < 500 + 2 * bank.layout.nbytes
    assert_same_blocks(bank, load_bank(tmp_path))


def test_a_loaded_bank_writes_what_is_new(make, tmp_path):
    make(chunks=50).save(tmp_path)
    before = files(tmp_path)
    bank = load_bank(tmp_path)
    random_chunks(2, seed=1, first=50).into(bank)
    bank.save(tmp_path)
    assert {name for name in before if name.startswith("blocks")} <= files(tmp_path).keys()


def test_many_small_saves_do_not_pile_up(make, tmp_path):
    bank = make(chunks=100)
    for turn in range(80):
        random_chunks(1, seed=turn, first=100 + turn).into(bank)
        bank.save(tmp_path)
    assert len(files(tmp_path)) < 90
    assert_same_blocks(bank, load_bank(tmp_path))


def test_chunks_that_have_left_go_with_the_rest_of_their_segment(make, tmp_path):
    bank = make(chunks=20)
    bank.save(tmp_path)
    bank.evict(15)
    bank.save(tmp_path)
    (blocks,) = tmp_path.glob("blocks-*")
    assert blocks.stat().st_size < 200 + len(bank) * bank.layout.nbytes
    assert_same_blocks(bank, load_bank(tmp_path))


def test_compact_leaves_nothing_of_a_removed_chunk(make, tmp_path):
    bank = make(chunks=20)
    bank.save(tmp_path)
    bank.remove([11])
    secret = np.full(6, 11, dtype=np.float32).tobytes()

    def is_there():
        return any(secret in path.read_bytes() for path in tmp_path.iterdir())

    bank.save(tmp_path)
    assert is_there()
    bank.save(tmp_path, compact=True)
    assert not is_there()


def test_two_banks_that_part_ways_are_never_mixed(make, tmp_path):
    make(chunks=10).save(tmp_path)
    one, other = load_bank(tmp_path), load_bank(tmp_path)
    random_chunks(3, seed=1, first=10).into(one)
    random_chunks(3, seed=2, first=70).into(other)
    one.save(tmp_path)
    other.save(tmp_path)
    assert_same_state(state_of(other), load_bank(tmp_path))
    assert_same_blocks(other, load_bank(tmp_path))


def test_a_lazy_bank_is_not_disturbed_by_what_is_saved_over_it(make, tmp_path):
    bank = make()
    bank.save(tmp_path)
    lazy = load_bank(tmp_path, lazy=True)
    bank.evict(30)
    bank.save(tmp_path, compact=True)
    assert (lazy.fetch([5]).keys == 5).all()
    assert len(lazy) == 38


def test_a_lazy_bank_holds_its_blocks_on_disk(make, tmp_path):
    make(chunks=50).save(tmp_path)
    lazy = load_bank(tmp_path, lazy=True)
    assert len(lazy.state.store._new) == 0
    random_chunks(1, seed=3, first=50).into(lazy)
    assert len(lazy.state.store._new) == 1
    lazy.save(tmp_path)
    assert_same_blocks(lazy, load_bank(tmp_path))


def test_blocks_go_where_the_store_says(make, tmp_path):
    bank = make()
    bank.save(tmp_path / "bank")
    loaded = load_bank(tmp_path / "bank", store=TieredStore(host=3 * bank.layout.nbytes, disk=tmp_path))
    assert_same_blocks(bank, loaded)


def test_what_exceeds_a_smaller_capacity_is_evicted(make, tmp_path):
    make(chunks=20).save(tmp_path)
    assert load_bank(tmp_path, max_chunks=5).ids.tolist() == [15, 16, 17, 18, 19]
    block = 2 * random_chunks(1).keys.nbytes
    assert len(load_bank(tmp_path, store=TieredStore(host=4 * block))) == 4


def test_a_bank_is_read_while_it_is_saved(make, tmp_path):
    bank, done = make(chunks=100), threading.Event()

    def search():
        while not done.is_set():
            bank.retrieve(random_vectors(1), 3)

    thread = threading.Thread(target=search)
    thread.start()
    try:
        for _ in range(5):
            bank.save(tmp_path, compact=True)
    finally:
        done.set()
        thread.join()
    assert_same_blocks(bank, load_bank(tmp_path))


GO_ON = """
import json, sys
from memlong import load_bank
from memlong.testing.persistence import what_follows
names = [None, "torch", "faiss", "hnswlib"]
print(json.dumps([what_follows(load_bank(sys.argv[1], name, trust_index=True)) for name in names]))
"""


@pytest.mark.slow
def test_a_fresh_process_goes_on_in_any_backend(make, backend, tmp_path):
    bank = make(backend, chunks=300)
    bank.save(tmp_path)
    command = [sys.executable, "-c", GO_ON, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(said) == [what_follows(bank)] * 4


def test_the_abstract_class_names_who_loads(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"memlong\.load_bank"):
        MemoryBank.load(tmp_path)


def test_another_metric_is_refused(make, tmp_path):
    make().save(tmp_path)
    with pytest.raises(InvalidArgumentError, match="metric is 'l2'"):
        load_bank(tmp_path, metric="l2")


def test_a_policy_of_ones_own_is_asked_for(make, tmp_path):
    class Mine(Fifo):
        name = "mine"

    make(eviction=Mine()).save(tmp_path)
    with pytest.raises(InvalidArgumentError, match="pass a policy as eviction"):
        load_bank(tmp_path)
    assert len(load_bank(tmp_path, eviction=Mine())) == 38


def test_lazy_and_a_store_do_not_go_together(make, tmp_path):
    make().save(tmp_path)
    with pytest.raises(InvalidArgumentError, match="use one of the two"):
        load_bank(tmp_path, lazy=True, store=InMemoryStore())


def test_a_class_that_no_plugin_has_is_never_imported(make, tmp_path):
    class PrivateIndex(TorchIndex):
        pass

    bank = bank_of(PrivateIndex)(DIM)
    random_chunks(3).into(bank)
    bank.save(tmp_path)
    with pytest.raises(InvalidArgumentError, match="not an installed backend"):
        load_bank(tmp_path)
    assert len(load_bank(tmp_path, "torch")) == 3
    with pytest.raises(UnknownNameError, match="There is no backend 'toch'"):
        load_bank(tmp_path, "toch")


@pytest.mark.parametrize("path", [None, "", 3, "a\0b"])
def test_a_path_must_be_one(make, path):
    with pytest.raises(InvalidArgumentError, match="path must be"):
        make().save(path)


def test_a_snapshot_that_takes_too_much_is_refused(make, tmp_path):
    make().save(tmp_path)
    with pytest.raises(SnapshotError, match="more than most_bytes, 1,000"):
        load_bank(tmp_path, most_bytes="1kB")


def maps_of(name):
    return [line for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines() if name in line]


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A bank whose embeddings count as large, in a folder."""
    monkeypatch.setattr(matrix, "_WORTH", 1)
    bank = create_bank("torch", DIM)
    for first in (0, 20):
        random_chunks(20, seed=first, first=first).into(bank)
        bank.save(tmp_path)
    bank.remove([3, 30])
    bank.save(tmp_path, compact=True)
    return bank, tmp_path


@pytest.mark.parametrize("backend", ["torch", "faiss", "hnswlib"])
def test_embeddings_are_mapped_and_changes_stay_in_this_process(large, backend):
    bank, folder = large
    (path,) = folder.glob("matrix-*")
    before = path.read_bytes()
    assert before == bank.embeddings.embeddings.numpy().tobytes()
    loaded, other = (load_bank(folder, backend, lazy=True) for _ in range(2))
    if sys.platform == "linux":
        assert maps_of(path.name)
    query = random_vectors(3)
    found, expected = loaded.retrieve(query, 9), bank.retrieve(query, 9)
    for name in ("ids", "scores", "keys", "values", "spans"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    loaded.state.table.embeddings[0] = 0
    for each in (loaded, bank):
        random_chunks(2, seed=7, first=90).into(each)
        each.remove([5])
    assert loaded.ids.tolist() == bank.ids.tolist()
    assert path.read_bytes() == before
    assert torch.equal(other.search(query, 9).ids, expected.ids)


def test_the_matrix_is_kept_while_nothing_changes_and_goes_with_what_leaves(large):
    bank, folder = large
    (path,) = folder.glob("matrix-*")
    bank.retrieve(random_vectors(1), 3)
    bank.save(folder)
    assert [*folder.glob("matrix-*")] == [path]
    verify(folder)
    lazy = load_bank(folder, lazy=True)
    bank.remove([4])
    bank.save(folder)
    assert not [*folder.glob("matrix-*")]
    assert 4 in lazy.search(lazy.embeddings.embeddings[3:4], 1).ids  # it still has what it opened
    compact(folder)
    assert len([*folder.glob("matrix-*")]) == 1
    assert verify(folder)["banks"][0]["chunks"] == len(load_bank(folder, lazy=True)) == 37


def test_a_matrix_of_other_embeddings_is_refused(large):
    _, folder = large
    (path,) = folder.glob("matrix-*")
    content = bytearray(path.read_bytes())
    for wrong in (bytes(content[:-4]), bytes(content[:-1]) + b"\0", bytes(len(content))):
        path.write_bytes(wrong)
        for look in (lambda place: load_bank(place, lazy=True), verify):
            with pytest.raises(
                SnapshotError, match=r"matrix-.*bytes instead of|SHA-256|does not hold the embedd"
            ):
                look(folder)
    assert len(load_bank(folder)) == 38  # which does not read it
