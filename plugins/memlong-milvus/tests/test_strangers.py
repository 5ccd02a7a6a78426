"""A stranger's snapshot or object store: no token goes where it says, and no session is lost by it."""

from __future__ import annotations

import hashlib
import json
import socket
import zlib
from pathlib import Path
from typing import Any

import pytest

from memlong import SnapshotError, create_bank, load_bank
from memlong.bank.store.block import HEAD, MAGIC
from memlong.errors import InvalidArgumentError, LostChunksWarning, StorageError
from memlong.testing.harness import DIM, random_chunks
from memlong_milvus.bank import MilvusBank


@pytest.fixture
def forged(tmp_path: Path) -> Any:
    """A snapshot whose manifest says that a MilvusBank of these options made it."""

    def make(**options: Any) -> Path:
        folder = tmp_path / "snapshot"
        bank = create_bank("torch", DIM)
        random_chunks(2).into(bank)
        bank.save(folder)
        data = json.loads((folder / "manifest.json").read_text())
        data.pop("sha256")
        data["banks"][0].update(made_by="memlong_milvus.bank:MilvusBank", options=options)
        text = json.dumps(data, indent=1)
        digest = hashlib.sha256(text.encode()).hexdigest()
        (folder / "manifest.json").write_text(f'{text[:-2]},\n "sha256": "{digest}"\n}}\n')
        return folder

    return make


def test_the_users_token_goes_to_no_host_of_a_snapshot(forged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMLONG_MILVUS_TOKEN", "root:secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        folder = forged(uri=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=1, attempts=1)
        with pytest.raises(SnapshotError, match="names the option 'uri'"):
            load_bank(folder)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_snapshot_writes_no_file_of_its_choice(forged: Any, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="no backend's own: store"):
        load_bank(forged(store=str(tmp_path / "victim")))
    assert not (tmp_path / "victim").exists()


def test_a_session_of_the_users_own_outlives_a_snapshot(
    forged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMLONG_MILVUS_URI", str(tmp_path / "memory.db"))
    with MilvusBank(DIM, session="alice") as bank:
        random_chunks(5).into(bank)
    folder = forged(session="alice", resume=True)
    with pytest.raises(SnapshotError, match="names the option 'session'"):
        load_bank(folder)
    with pytest.raises(InvalidArgumentError, match="resume continues what a session holds"):
        load_bank(folder, session="alice", resume=True)
    with MilvusBank.reopen(DIM, session="alice") as bank:
        assert len(bank.fetch(bank.ids).keys) == 5


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """What the session alice of five chunks has left in its folder of objects."""
    with MilvusBank(DIM, uri=str(tmp_path / "memory.db"), session="alice") as bank:
        random_chunks(5).into(bank)
        folder = bank.state.store.folder.name
    return tmp_path / "memory.kv" / folder


def reopened(tmp_path: Path) -> MilvusBank:
    return MilvusBank.reopen(DIM, uri=str(tmp_path / "memory.db"), session="alice")


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "[]",
        "3",
        '{"newest": 1e400}',
        '{"newest": "x"}',
        '{"newest": 1%s}' % ("0" * 40),
        "x" * (2 << 20),
    ],
    ids=["deep", "list", "number", "infinite", "text", "huge", "long"],
)
def test_facts_of_a_stranger_are_told_to_be_none(left: Path, tmp_path: Path, content: str) -> None:
    (left / "bank.json").write_text(content)
    with pytest.raises(StorageError, match=r"bank\.json.* is damaged"):
        reopened(tmp_path)


def test_a_folder_in_place_of_the_facts_is_told(left: Path, tmp_path: Path) -> None:
    (left / "bank.json").unlink()
    (left / "bank.json").mkdir()
    with pytest.raises(StorageError, match="is not a regular file"):
        reopened(tmp_path)


def test_a_huge_newest_id_costs_no_endless_queries(left: Path, tmp_path: Path) -> None:
    facts = json.loads((left / "bank.json").read_text())
    (left / "bank.json").write_text(json.dumps({**facts, "newest": 10**18}))
    (left / f"{'9' * 200}.kv").write_bytes(b"")
    (left / "007.kv").write_bytes(b"")
    (left / f"{'9' * 18}.kv").write_bytes(b"")
    with reopened(tmp_path) as bank:
        assert bank.ids.tolist() == list(range(5))
        assert len(bank.rows.held()) == 5


@pytest.mark.parametrize("header", ["[1]", "[" * 10_000, '{"shape": "x"}', '{"shape": [1, 1, 1, -1]}', "{}"])
def test_an_object_of_a_stranger_is_a_lost_chunk(left: Path, tmp_path: Path, header: str) -> None:
    body = header.encode()
    (left / "0.kv").write_bytes(HEAD.pack(MAGIC, len(body), zlib.crc32(body)) + body)
    with reopened(tmp_path) as bank:
        with pytest.warns(LostChunksWarning, match="chunk 0"):
            bank.fetch(bank.ids)
        assert bank.ids.tolist() == [1, 2, 3, 4]
