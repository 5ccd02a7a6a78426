"""Objects that go missing, are damaged or cannot be written."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from memlong.bank import ObjectFolder, objects_at
from memlong.bank.store.objects import LocalObjects
from memlong.errors import InvalidArgumentError, LostChunksError, LostChunksWarning, StorageError
from memlong.testing.harness import DIM, assert_same_state, random_chunks, state_of
from memlong_milvus.bank import MilvusBank
from memlong_milvus.store import SessionStore

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "its object is missing"),
    "empty": (lambda path: path.write_bytes(b""), "cut off after 0 bytes"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-5]), "checksum differs"),
    "a bit": (lambda path: path.write_bytes(_flipped(path.read_bytes())), "checksum differs"),
    "another's": (lambda path: path.write_bytes(path.with_name("9.kv").read_bytes()), "it is chunk 9"),
    "no block": (lambda path: path.write_bytes(b"x" * 100), "does not begin as a chunk"),
}


def _flipped(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[-7] ^= 4
    return bytes(changed)


def _objects_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.rglob("*.kv") if path.is_file()}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_chunk_whose_object_is_lost_is_a_miss(kind: str, tmp_path: Path) -> None:
    bank = MilvusBank(DIM, store=str(tmp_path))
    chunks = random_chunks(10)
    chunks.into(bank)
    damage, reason = DAMAGE[kind]
    damage(_objects_of(tmp_path)["3.kv"])
    with pytest.warns(LostChunksWarning, match=f"chunk 3 .*{reason}.*forgotten"):
        got = bank.retrieve(chunks.embeddings[3:4], 5)
    assert 3 not in got.ids
    assert got.found.all()
    assert (got.keys == got.ids.view(1, 5, 1, 1, 1, 1)).all()
    assert bank.ids.tolist() == [0, 1, 2, *range(4, 10)]
    assert bank.retrieve(chunks.embeddings, 1).found.all()


def test_saving_leaves_out_what_is_lost(tmp_path: Path) -> None:
    bank = MilvusBank(DIM, store=str(tmp_path / "kv"))
    random_chunks(10).into(bank)
    _objects_of(tmp_path)["3.kv"].unlink()
    with pytest.warns(LostChunksWarning, match="chunk 3"):
        bank.save(tmp_path / "saved")
    assert len(MilvusBank.load(tmp_path / "saved")) == 9


def test_a_put_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = MilvusBank(DIM, store=str(tmp_path))
    random_chunks(5).into(bank)
    before = state_of(bank)
    open_file = Path.open

    def failing(path: Path, *given: object) -> object:
        if path.name.startswith(".7."):
            raise OSError(28, "No space left on device")
        return open_file(path, *given)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(StorageError, match=r"7\.kv.* cannot be written: No space left.*name another place"):
        random_chunks(5, seed=1, first=5).into(bank)
    assert_same_state(before, bank)
    assert set(_objects_of(tmp_path)) == {f"{number}.kv" for number in range(5)}


def test_what_cannot_be_deleted_now_is_deleted_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = MilvusBank(DIM, store=str(tmp_path))
    random_chunks(5).into(bank)

    def failing(self: LocalObjects, names: object) -> None:
        raise OSError("busy")

    with monkeypatch.context() as patch:
        patch.setattr(LocalObjects, "delete", failing)
        bank.remove([0, 1])
    assert len(bank) == 3
    assert "0.kv" in _objects_of(tmp_path)
    bank.remove([2])
    assert set(_objects_of(tmp_path)) == {"3.kv", "4.kv"}


def test_a_leftover_object_that_is_written_again_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The id of an add that failed is the next one's: its object must not go with what the failure left."""
    bank = MilvusBank(DIM, store=str(tmp_path), attempts=1)
    random_chunks(5).into(bank)

    def failing(*_: object, **__: object) -> None:
        raise OSError("busy")

    with monkeypatch.context() as patch:
        patch.setattr(bank.index, "add", failing)
        patch.setattr(LocalObjects, "delete", failing)
        with pytest.raises(OSError, match="busy"):
            random_chunks(2, seed=1, first=5).into(bank)
    assert "5.kv" in _objects_of(tmp_path)
    random_chunks(1, seed=2, first=5).into(bank)
    bank.remove([0])
    assert set(_objects_of(tmp_path)) == {f"{number}.kv" for number in range(1, 6)}


def test_a_session_that_cannot_be_removed_does_not_keep_others_from_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = MilvusBank(DIM, store=str(tmp_path))
    random_chunks(2).into(bank)

    def failing(*_: object) -> None:
        raise PermissionError("access denied")

    with monkeypatch.context() as patch:
        patch.setattr(LocalObjects, "delete_folder", failing)
        with pytest.raises(StorageError, match=r"cannot be removed in .*access denied"):
            bank.close()
        del bank
        gc.collect()
        assert len(MilvusBank(DIM)) == 0


def test_a_place_that_is_away_costs_no_chunk(tmp_path: Path) -> None:
    """A folder that is not mounted has no objects either, and they are not lost."""
    bank = MilvusBank(DIM, uri=str(tmp_path / "memory.db"), session="a", store=str(tmp_path / "kv"))
    chunks = random_chunks(5)
    chunks.into(bank)
    (tmp_path / "kv").rename(tmp_path / "away")
    with pytest.raises(StorageError, match=r"cannot be read in .*Is the place there"):
        bank.retrieve(chunks.embeddings, 1)
    (tmp_path / "away").rename(tmp_path / "kv")
    assert bank.retrieve(chunks.embeddings, 1).ids[:, 0].tolist() == list(range(5))


def test_one_retrieval_reads_its_objects_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read waits for three others: one after the other they would wait in vain."""
    bank = MilvusBank(DIM, store=str(tmp_path), readers=4)
    chunks = random_chunks(8)
    chunks.into(bank)
    together, read = threading.Barrier(4, timeout=10), LocalObjects.read

    def meeting(self: LocalObjects, name: str, most: int) -> bytes:
        together.wait()
        return read(self, name, most)

    monkeypatch.setattr(LocalObjects, "read", meeting)
    assert bank.retrieve(chunks.embeddings[:1], 4).found.all()


def test_any_place_that_fsspec_knows_will_do(tmp_path: Path) -> None:
    folder = ObjectFolder(
        objects_at("memory://bucket/kv"), "c-0/a", readers=2, lasting=True, notes={"dim": 4, "newest": -1}
    )
    store = SessionStore(folder, named=True)
    keys = torch.arange(24.0).view(3, 1, 2, 2, 2)
    store.put([0, 1, 2], keys, -keys)
    assert torch.equal(store.get([2, 0])[0], keys[[2, 0]])
    assert folder.ids() == [0, 1, 2]
    assert folder.notes()["newest"] == -1
    store.remove([2, 1])
    assert folder.ids() == [0]
    assert folder.notes()["newest"] == 2
    objects_at("memory://bucket/kv").delete(["c/none", "c-0/a/0.kv"])
    with pytest.raises(LostChunksError, match="chunk 0"):
        store.get([0])
    folder.drop()
    assert objects_at("memory://bucket/kv").list() == []


@pytest.mark.parametrize(("store", "message"), [("nope://x", "that fsspec knows"), (7, "store must be")])
def test_odd_stores_are_refused(store: object, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        MilvusBank(DIM, store=store)  # type: ignore[arg-type]
