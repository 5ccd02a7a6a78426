"""A stranger's snapshot or object store: no token goes where it says, and no session is lost by it."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from memlong import SnapshotError, create_bank, load_bank
from memlong.errors import InvalidArgumentError
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
    with pytest.raises(InvalidArgumentError, match="resume goes on with what a session holds"):
        load_bank(folder, session="alice", resume=True)
    with MilvusBank.reopen(DIM, session="alice") as bank:
        assert len(bank.fetch(bank.ids).keys) == 5
