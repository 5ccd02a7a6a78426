"""Keys and values as objects next to any backend: whole or not at all, checked, and gone with their bank."""

from __future__ import annotations

import builtins
import gc
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest
import torch

from memlong import MemoryConfig, create_bank, load_bank
from memlong.bank import ChunkLayout, ObjectFolder, TieredStore, objects_at
from memlong.bank.store.block import BlockKind, decode, encode, kind_of
from memlong.bank.store.objects import LocalObjects, RemoteObjects
from memlong.errors import (
    InvalidArgumentError,
    LostChunksError,
    LostChunksWarning,
    MissingDependencyError,
    StorageError,
)
from memlong.testing.harness import DIM, assert_same_state, random_chunks, state_of


def objects_in(folder):
    return {path.name: path for path in folder.rglob("*.kv")}


def flipped(content):
    return content[:-7] + bytes([content[-7] ^ 4]) + content[-6:]


@pytest.fixture(params=["folder", "memory"])
def place(request, tmp_path):
    return str(tmp_path / "kv") if request.param == "folder" else f"memory://{tmp_path.name}/kv"


@pytest.mark.parametrize("backend", ["torch", "faiss", "hnswlib"])
def test_a_bank_of_any_backend_lives_next_to_an_object_store(place, backend, tmp_path):
    bank = create_bank(backend, DIM, max_chunks=20, store=TieredStore(objects=place, host="1KB"))
    plain = create_bank(backend, DIM, max_chunks=20)
    chunks = random_chunks(30)
    for each in (bank, plain):
        chunks.into(each)
        each.remove([15, 17])
    got, expected = (each.retrieve(chunks.embeddings, 4) for each in (bank, plain))
    assert torch.equal(got.ids, expected.ids)
    assert torch.equal(got.keys, expected.keys)
    assert torch.equal(got.values, expected.values)
    held = {f"{chunk_id}.kv" for chunk_id in bank.ids.tolist()}
    assert {each.name.rpartition("/")[2] for each in objects_at(place).list()} == held | {"bank.json"}
    bank.save(tmp_path / "saved")
    again = load_bank(tmp_path / "saved", store=TieredStore(objects=place))
    assert torch.equal(again.fetch(again.ids).keys, bank.fetch(bank.ids).keys)


def test_the_objects_of_a_bank_go_with_it(place):
    first, second = (create_bank("torch", DIM, store=TieredStore(objects=place)) for _ in range(2))
    for bank in (first, second):
        random_chunks(3).into(bank)
    first.reset()
    assert sum(each.name.endswith(".kv") for each in objects_at(place).list()) == 3
    random_chunks(2, seed=1).into(first)
    del first, bank
    gc.collect()
    assert sum(each.name.endswith(".kv") for each in objects_at(place).list()) == 3
    assert len(second.fetch(second.ids).keys) == 3
    del second
    gc.collect()
    assert objects_at(place).list() == []


def test_the_objects_of_a_process_that_ends_go(tmp_path):
    script = (
        "from memlong import create_bank; from memlong.bank import TieredStore\n"
        "from memlong.testing.harness import random_chunks\n"
        f"bank = create_bank('torch', 32, store=TieredStore(objects={str(tmp_path / 'kv')!r}))\n"
        "random_chunks(3).into(bank)\n"
        f"import pathlib; print(len(list(pathlib.Path({str(tmp_path)!r}).rglob('*.kv'))))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"
    assert not objects_in(tmp_path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "its object is missing"),
        (lambda path: path.write_bytes(b""), "cut off after 0 bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "checksum differs"),
        (lambda path: path.write_bytes(flipped(path.read_bytes())), "checksum differs"),
        (lambda path: path.write_bytes(path.with_name("9.kv").read_bytes()), "it is chunk 9"),
        (lambda path: path.write_bytes(b"x" * 100), "does not begin as a chunk"),
    ],
)
def test_a_lost_block_names_its_chunk_and_the_bank_forgets_it(tmp_path, damage, reason):
    store = TieredStore(objects=tmp_path)
    bank = create_bank("faiss", DIM, store=store)
    chunks = random_chunks(10)
    chunks.into(bank)
    damage(objects_in(tmp_path)["3.kv"])
    with pytest.raises(LostChunksError, match=f"chunk 3 .*{reason}") as caught:
        store.get([1, 3, 5])
    assert list(caught.value.reasons) == [3]
    with pytest.warns(LostChunksWarning, match=f"chunk 3 .*{reason}.*forgotten"):
        got = bank.retrieve(chunks.embeddings[3:4], 5)
    assert 3 not in got.ids
    assert got.found.all()
    assert bank.ids.tolist() == [0, 1, 2, *range(4, 10)]


def test_a_place_that_is_away_costs_no_chunk(tmp_path):
    """A folder that is not mounted has no objects either, and they are not lost."""
    bank = create_bank("torch", DIM, store=TieredStore(objects=tmp_path / "kv"))
    chunks = random_chunks(5)
    chunks.into(bank)
    (tmp_path / "kv").rename(tmp_path / "away")
    with pytest.raises(StorageError, match=r"cannot be read in .*Is the place there"):
        bank.retrieve(chunks.embeddings, 1)
    (tmp_path / "away").rename(tmp_path / "kv")
    assert bank.retrieve(chunks.embeddings, 1).ids[:, 0].tolist() == list(range(5))


def test_a_put_that_fails_leaves_nothing(tmp_path, monkeypatch):
    bank = create_bank("torch", DIM, store=TieredStore(objects=tmp_path))
    random_chunks(5).into(bank)
    before, open_file = state_of(bank), Path.open

    def failing(path, *given):
        if path.name.startswith(".7."):
            raise OSError(28, "No space left on device")
        return open_file(path, *given)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(StorageError, match=r"7\.kv.* cannot be written: No space left.*name another place"):
        random_chunks(5, seed=1, first=5).into(bank)
    assert_same_state(before, bank)
    assert set(objects_in(tmp_path)) == {f"{number}.kv" for number in range(5)}


def test_what_cannot_be_deleted_now_is_deleted_later(tmp_path, monkeypatch):
    bank = create_bank("torch", DIM, store=TieredStore(objects=tmp_path))
    random_chunks(5).into(bank)

    def failing(*_):
        raise OSError("busy")

    with monkeypatch.context() as patch:
        patch.setattr(LocalObjects, "delete", failing)
        bank.remove([0, 1])
    assert "0.kv" in objects_in(tmp_path)
    bank.remove([2])
    assert set(objects_in(tmp_path)) == {"3.kv", "4.kv"}


def test_one_retrieval_reads_its_objects_at_the_same_time(tmp_path, monkeypatch):
    """Each read waits for three others: one after the other they would wait in vain."""
    bank = create_bank("torch", DIM, store=TieredStore(objects=tmp_path, readers=4))
    chunks = random_chunks(8)
    chunks.into(bank)
    together, read = threading.Barrier(4, timeout=10), LocalObjects.read

    def meeting(self, name, most):
        together.wait()
        return read(self, name, most)

    monkeypatch.setattr(LocalObjects, "read", meeting)
    assert bank.retrieve(chunks.embeddings[:1], 4).found.all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_reads_the_objects_and_changes_none(tmp_path):
    script = (
        "import os, sys; from memlong import create_bank; from memlong.bank import TieredStore\n"
        "from memlong.errors import StorageError\n"
        "from memlong.testing.harness import random_chunks\n"
        f"bank = create_bank('torch', 32, store=TieredStore(objects={str(tmp_path)!r}))\n"
        "random_chunks(3).into(bank)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    assert bank.fetch(bank.ids).keys[:, 0, 0, 0, 0].tolist() == [0, 1, 2]\n"
        "    for act in (lambda: random_chunks(1).into(bank), lambda: bank.remove([0]), bank.reset):\n"
        "        try:\n"
        "            act()\n"
        "        except StorageError as error:\n"
        "            assert 'from which this one was forked' in str(error)\n"
        "        else:\n"
        "            raise AssertionError(act)\n"
        "    assert len(bank) == 3\n"
        "    sys.exit()\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert len(bank.fetch(bank.ids).keys) == 3\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_lasts_is_taken_over(place):
    chunks = random_chunks(4)
    folder = ObjectFolder(objects_at(place), "a/mine", lasting=True, notes={"dim": DIM})
    store = TieredStore(objects=folder, dtype="int8")
    store.put(range(4), chunks.keys, chunks.values)
    before = store.get([1, 3])
    store.remove([2])
    del store, folder
    folder = ObjectFolder(objects_at(place), "a/mine", lasting=True)
    assert folder.notes() == {"dim": DIM}
    with pytest.raises(InvalidArgumentError, match="give dtype='int8'"):
        TieredStore(objects=folder).adopt(folder.ids(), torch.device("cpu"))
    store = TieredStore(objects=folder, dtype="int8")
    assert store.adopt([0, 1, 3], torch.device("cpu")) == ChunkLayout.of(chunks.keys)
    assert len(store) == 3
    for found, expected in zip(store.get([1, 3]), before, strict=True):
        assert torch.equal(found, expected)
    folder.drop()
    assert objects_at(place).list() == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_block_comes_back_bit_for_bit(dtype):
    kind = BlockKind((3, 2, 5, 4), dtype, None)
    record = torch.randint(256, (240 * dtype.itemsize,), dtype=torch.uint8)
    content, read = encode("s", 7, kind, record), torch.zeros_like(record)
    decode(content, "s", 7, kind, read)
    assert torch.equal(read, record)
    assert kind_of(content, "s", 7) == kind


def test_a_block_of_another_kind_is_told():
    kind = BlockKind((1, 1, 2, 2), torch.float32, None)
    content = encode("s", 7, kind, torch.zeros(32, dtype=torch.uint8))
    half = BlockKind((1, 1, 2, 2), torch.float16, "int8")
    with pytest.raises(ValueError, match=r"holds torch.float32 \[1, 1, 2, 2\], not torch.float16 .* as int8"):
        decode(content, "s", 7, half, torch.zeros(16, dtype=torch.uint8))


def test_objects_without_fsspec_say_how_to_install_it(monkeypatch, tmp_path):
    load = builtins.__import__

    def without(name, *given, **more):
        if name.startswith("fsspec"):
            raise ImportError("No module named 'fsspec'")
        return load(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'memlong\[objects\]'"):
        TieredStore(objects="s3://bucket/folder")
    TieredStore(objects=tmp_path)  # needs nothing


def test_errors_show_no_secret(monkeypatch):
    uri = "memory://me:hush-hush@bucket/kv"
    store = TieredStore(objects=uri)

    def denied(*_):
        raise PermissionError(f"access denied to {uri}")

    monkeypatch.setattr(RemoteObjects, "write", denied)
    with pytest.raises(StorageError, match="cannot be written in 'memory://") as caught:
        store.put([0], *[torch.zeros(1, 1, 1, 2, 2)] * 2)
    assert "hush" not in f"{caught.value} {caught.value!r}"
    assert "hush" not in repr(MemoryConfig(store={"objects": uri}))


def test_what_fsspec_lists_has_a_time(place):
    objects = objects_at(place)
    objects.write("a/b", b"x")
    (found,) = objects.list()
    assert (found.name, 0 < found.written < float("inf")) == ("a/b", True)
    with pytest.raises(ValueError, match="more than 0 bytes"):
        objects.read("a/b", 0)
    objects.delete(["a/none", "a/b"])
    assert objects.list() == []
    with pytest.raises(FileNotFoundError):
        objects.read("a/b", 10)


@pytest.fixture(autouse=True)
def empty_memory():
    yield
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def test_a_folder_is_one_stores(place):
    folder = ObjectFolder(objects_at(place))
    store = TieredStore(objects=folder)
    with pytest.raises(InvalidArgumentError, match="no other store uses"):
        TieredStore(objects=folder)
    del store
    TieredStore(objects=folder)


@pytest.mark.parametrize("name", ["..", ".", "a/../b", "/x", "", "a//b", 5])
def test_a_folder_stays_within_its_place(place, name):
    with pytest.raises(InvalidArgumentError, match="name must be parts"):
        ObjectFolder(objects_at(place), name)


def test_a_block_that_may_not_be_read_is_not_taken_for_lost(tmp_path, monkeypatch):
    folder = ObjectFolder(objects_at(tmp_path), "mine", lasting=True)
    chunks = random_chunks(2)
    TieredStore(objects=folder).put([0, 1], chunks.keys, chunks.values)

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(objects_at(tmp_path)), "read", refused)
    with pytest.raises(StorageError, match="cannot be read"):
        TieredStore(objects=ObjectFolder(objects_at(tmp_path), "mine", lasting=True)).adopt(
            [0, 1], torch.device("cpu")
        )


def test_many_lost_chunks_cost_a_save_one_restart_and_one_warning(tmp_path):
    bank = create_bank("torch", DIM, store=TieredStore(objects=tmp_path / "objects", readers=2))
    random_chunks(40).into(bank)
    for path in sorted((tmp_path / "objects").rglob("*.kv"))[::2]:
        path.unlink()
    with pytest.warns(LostChunksWarning) as told:
        bank.save(tmp_path / "saved")
    assert len(told) == 1
    assert len(bank) == len(load_bank(tmp_path / "saved")) == 20


def test_a_store_that_names_chunks_of_nobodys_as_lost_ends_the_call(tmp_path, monkeypatch):
    bank = create_bank("torch", DIM, store=TieredStore(objects=tmp_path))
    random_chunks(3).into(bank)

    def lost(*_):
        raise LostChunksError({99: "its object is missing"})

    monkeypatch.setattr(bank.state.store, "get", lost)
    with pytest.raises(LostChunksError):
        bank.fetch([0])


def test_a_folder_that_was_removed_is_begun_again_by_a_reset(tmp_path):
    bank = create_bank("torch", DIM, store=TieredStore(objects=tmp_path / "objects"))
    random_chunks(3).into(bank)
    shutil.rmtree(tmp_path / "objects")
    bank.reset()
    random_chunks(3, first=3).into(bank)
    assert len(bank.fetch([3, 4, 5]).ids) == 3
    next(iter((tmp_path / "objects").rglob("4.kv"))).unlink()
    with pytest.warns(LostChunksWarning, match="chunk 4"):
        assert bank.fetch([3, 4, 5]).ids.tolist() == [3, 5]


def test_what_a_library_behind_fsspec_raises_shows_no_credentials(monkeypatch):
    objects = objects_at("memory://me:sesame@bucket/x")

    def refused(*_, **__):
        raise RuntimeError("no access for s3://me:sesame@bucket")

    monkeypatch.setattr(type(objects._files), "pipe_file", refused)
    with pytest.raises(StorageError, match="cannot be used") as told:
        objects.write("a", b"1")
    assert "sesame" not in str(told.value)
    assert told.value.__cause__ is None


def test_several_threads_read_the_objects_of_one_bank_at_the_same_time(tmp_path, monkeypatch):
    bank = create_bank("torch", DIM, store=TieredStore(objects=tmp_path))
    random_chunks(2).into(bank)
    read, together = LocalObjects.read, threading.Barrier(2, timeout=20)

    def waiting(self, name, most):
        together.wait()  # for the other thread's read: breaks if that waits for this one
        return read(self, name, most)

    monkeypatch.setattr(LocalObjects, "read", waiting)
    found = []
    threads = [
        threading.Thread(target=lambda each=each: found.append(bank.fetch([each]))) for each in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.ids.tolist() for each in found) == [[0], [1]]


def test_a_bank_can_be_saved_while_the_interpreter_ends(tmp_path):
    program = (
        "import atexit, sys\n"
        "from memlong import create_bank\n"
        "from memlong.bank import TieredStore\n"
        "from memlong.testing.harness import DIM, random_chunks\n"
        "bank = create_bank('torch', DIM, store=TieredStore(objects=sys.argv[1]))\n"
        "random_chunks(5).into(bank)\n"
        "atexit.register(bank.save, sys.argv[2])\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, tmp_path / "kv", tmp_path / "saved"], check=True, timeout=100
    )
    assert len(load_bank(tmp_path / "saved")) == 5
