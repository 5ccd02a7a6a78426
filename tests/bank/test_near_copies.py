"""A chunk whose object is lost is read from a nearer tier, and its object is written again."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path

import pytest
import torch

from memlong import create_bank, load_bank
from memlong.bank import ObjectFolder, TieredStore, objects_at
from memlong.bank.store.objects import LocalObjects
from memlong.errors import LostChunksError, LostChunksWarning
from memlong.testing.harness import DIM, random_chunks


def objects_in(folder):
    return {path.name: path for path in folder.rglob("*.kv")}


DAMAGES = {
    "missing": Path.unlink,
    "damaged": lambda path: path.write_bytes(path.read_bytes()[:-5]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("act", ["peek", "save", "deepcopy", "pickle"])
@pytest.mark.filterwarnings("error")
def test_a_near_copy_saves_a_lost_object(tmp_path, act, damage):
    store = TieredStore(host="all", objects=tmp_path / "kv", readers=3)
    bank = create_bank("torch", DIM, store=store)
    chunks = random_chunks(10)
    chunks.into(bank)
    before = {name: path.read_bytes() for name, path in objects_in(tmp_path).items()}
    for name in ("0.kv", "3.kv", "4.kv", "9.kv"):
        damage(objects_in(tmp_path)[name])
    if act == "peek":
        keys = torch.stack([each for each, _ in store.peek(range(10))])
    elif act == "save":
        bank.save(tmp_path / "saved")
        again = load_bank(tmp_path / "saved")
        keys = again.fetch(again.ids).keys
    else:
        other = copy.deepcopy(bank) if act == "deepcopy" else pickle.loads(pickle.dumps(bank))  # noqa: S301
        keys = other.fetch(other.ids).keys
    assert torch.equal(keys, chunks.keys)
    assert {path.name: path.read_bytes() for path in objects_in(tmp_path).values()}.items() >= before.items()


def test_what_no_tier_holds_is_lost_and_the_rest_is_saved(tmp_path):
    store = TieredStore(host="all", objects=tmp_path / "kv", readers=3)
    bank = create_bank("torch", DIM, store=store)
    random_chunks(10).into(bank)
    store._near[0].remove([3, 8])
    for path in objects_in(tmp_path).values():
        path.unlink()
    with pytest.raises(LostChunksError) as caught:
        list(store.peek(range(10)))
    assert sorted(caught.value.reasons) == [3, 8]
    with pytest.warns(LostChunksWarning, match="chunks? 3.*8.*forgotten") as told:
        bank.save(tmp_path / "saved")
    assert len(told) == 1
    assert len(bank) == len(load_bank(tmp_path / "saved")) == len(objects_in(tmp_path / "kv")) == 8


def test_a_near_copy_is_read_where_its_object_cannot_be_written(tmp_path, monkeypatch):
    folder = ObjectFolder(objects_at(tmp_path))
    store = TieredStore(host="all", objects=folder)
    chunks = random_chunks(4)
    store.put(range(4), chunks.keys, chunks.values)
    objects_in(tmp_path)["2.kv"].unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LocalObjects, "write", full)
        assert torch.equal(torch.stack([keys for keys, _ in store.peek(range(4))]), chunks.keys)
    assert "2.kv" not in objects_in(tmp_path)
    store.remove([0])  # retries what could not be removed, which must not be a chunk that is held
    assert torch.equal(torch.stack([keys for keys, _ in store.peek([1, 2, 3])]), chunks.keys[1:])
    store.remove([1])
    assert set(objects_in(tmp_path)) == {"2.kv", "3.kv"}


def test_a_near_tier_holds_the_same_chunks_after_a_rescue(tmp_path):
    chunks = random_chunks(6)
    store = TieredStore(host=4 * chunks.keys[:1].nbytes, objects=tmp_path)  # two blocks of keys and values
    store.put(range(6), chunks.keys, chunks.values)
    objects_in(tmp_path)["4.kv"].unlink()
    assert len(list(store.peek(range(6)))) == 6
    assert set(store._near[0]._records) == {4, 5}


def test_readers_side_by_side_rescue_the_same_chunks(tmp_path):
    store = TieredStore(host="all", objects=tmp_path, readers=2)
    chunks = random_chunks(20)
    store.put(range(20), chunks.keys, chunks.values)
    for path in objects_in(tmp_path).values():
        path.unlink()
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(torch.stack([each for each, _ in store.peek(range(20))]))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3
    assert all(torch.equal(each, chunks.keys) for each in found)


@pytest.mark.parametrize("act", ["save", "deepcopy", "pickle"])
def test_a_warning_of_lost_chunks_names_the_line_of_the_caller(tmp_path, act):
    bank = create_bank("torch", DIM, store=TieredStore(objects=tmp_path / "kv"))
    random_chunks(3).into(bank)
    objects_in(tmp_path)["1.kv"].unlink()
    acts = {
        "save": lambda: bank.save(tmp_path / "saved"),
        "deepcopy": lambda: copy.deepcopy(bank),
        "pickle": lambda: pickle.dumps(bank),
    }
    with pytest.warns(LostChunksWarning) as told:
        acts[act]()
    assert told[0].filename == __file__
    assert told[0].lineno == acts[act].__code__.co_firstlineno
