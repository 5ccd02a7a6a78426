"""A server that is killed and started again: nothing is lost, nothing comes twice."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from milvus_server import Server

from memlong.testing.harness import DIM, random_chunks
from memlong_milvus.__main__ import main
from memlong_milvus.bank import MilvusBank
from memlong_milvus.errors import BackendError
from memlong_milvus.rows import SessionRows
from memlong_milvus.sessions import Session
from memlong_milvus.sweep import sweep

pytestmark = pytest.mark.server


def test_a_killed_server_is_a_clear_error_and_the_bank_is_as_it_was(own_server: Server) -> None:
    bank = MilvusBank(DIM, uri=own_server.uri, attempts=2, timeout=5)
    chunks = random_chunks(20)
    chunks.into(bank)
    own_server.kill()
    with pytest.raises(BackendError, match=r"did not search in 2 attempts.*Is the server there"):
        bank.search(chunks.embeddings[:1], 3)
    with pytest.raises(BackendError, match=r"did not upsert in 2 attempts.*the bank is as it was"):
        random_chunks(5, seed=1, first=20).into(bank)
    assert bank.ids.tolist() == list(range(20))
    assert bank.exact_search(chunks.embeddings[:1], 1).ids.tolist() == [[0]]


def test_what_was_added_before_and_after_a_kill_is_there_once(own_server: Server, tmp_path: Path) -> None:
    """The stream goes on while the server is away; what fails is tried again by its caller, as an application would."""
    place = {"uri": own_server.uri, "session": "stream", "store": str(tmp_path / "kv")}
    bank = MilvusBank(DIM, **place, attempts=2, timeout=5)
    failures = 0
    killing = threading.Thread(target=_kill_and_start, args=(own_server, 0.5))
    killing.start()
    first = 0
    deadline = time.monotonic() + 150
    while first < 400 or killing.is_alive():
        assert time.monotonic() < deadline
        chunks = random_chunks(5, seed=first, first=first)
        try:
            assert chunks.into(bank).tolist() == list(range(first, first + 5))
            first += 5
            found = bank.retrieve(chunks.embeddings, 1)
            assert found.ids[:, 0].tolist() == list(range(first - 5, first))
        except BackendError:
            failures += 1
    killing.join()
    assert failures, "the kill was not felt: the test shows nothing"
    _assert_all_there(bank, first)
    del bank
    _assert_all_there(MilvusBank.reopen(DIM, **place), first)


def test_a_short_outage_is_waited_out(own_server: Server) -> None:
    """With attempts enough, callers notice nothing but the time it takes."""
    bank = MilvusBank(DIM, uri=own_server.uri, attempts=30, timeout=10)
    random_chunks(10).into(bank)
    killing = threading.Thread(target=_kill_and_start, args=(own_server, 0.0))
    killing.start()
    time.sleep(0.5)
    chunks = random_chunks(10, seed=1, first=10)
    assert chunks.into(bank).tolist() == list(range(10, 20))
    killing.join()
    assert bank.retrieve(chunks.embeddings, 1).ids[:, 0].tolist() == list(range(10, 20))
    assert bank.rows.held().tolist() == list(range(20))


def test_a_client_that_is_killed_leaves_what_it_was_told_is_there(own_server: Server, tmp_path: Path) -> None:
    place = {"uri": own_server.uri, "session": "client", "store": str(tmp_path / "kv")}
    script = (
        "import sys; from memlong.testing.harness import random_chunks\n"
        "from memlong_milvus.bank import MilvusBank\n"
        f"bank = MilvusBank({DIM}, **{place!r})\n"
        "first = 0\n"
        "while True:\n"
        "    random_chunks(3, seed=first, first=first).into(bank)\n"
        "    first += 3\n"
        "    print(first, flush=True)\n"
    )
    client = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    said = [next(client.stdout) for _ in range(30)]
    client.kill()
    said += client.stdout.readlines()
    client.wait()
    client.stdout.close()
    promised = int(said[-1])
    bank = MilvusBank.reopen(DIM, **place)
    assert bank.ids.tolist()[:promised] == list(range(promised))
    assert len(bank) <= promised + 3
    _assert_all_there(bank, len(bank))
    assert random_chunks(1, first=bank.next_id).into(bank).tolist()[0] >= len(bank) - 1


def test_what_a_killed_client_had_without_a_name_can_be_purged(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = {"uri": server.uri, "store": str(tmp_path / "kv"), "collection": "purged"}
    named = MilvusBank(DIM, **place, session="stays")
    random_chunks(4).into(named)
    script = (
        "import os; from memlong.testing.harness import random_chunks\n"
        "from memlong_milvus.bank import MilvusBank\n"
        f"bank = MilvusBank({DIM}, **{place!r})\n"
        "random_chunks(3).into(bank)\n"
        "print(bank.rows.session.key, flush=True)\n"
        "os._exit(1)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False).stdout
    left = SessionRows(named.engine, named.rows.collection, Session.of_key(said.strip()))
    assert left.held().tolist() == [0, 1, 2]
    assert main(["purge", "--uri", server.uri]) == 0
    assert "purged" in capsys.readouterr().out
    assert not len(left.held())
    assert named.rows.held().tolist() == list(range(4))
    assert sweep(place["store"], uri=server.uri, grace=0).orphans == 3


def _kill_and_start(server: Server, after: float) -> None:
    time.sleep(after)
    server.kill()
    time.sleep(1.0)
    server.start()


def _assert_all_there(bank: MilvusBank, count: int) -> None:
    assert bank.ids.tolist() == list(range(count))
    assert bank.rows.held().tolist() == list(range(count))
    chunks = bank.fetch(bank.ids)
    assert torch.equal(chunks.keys[:, 0, 0, 0, 0], torch.arange(count).float())
    assert torch.equal(chunks.spans[:, 0], 3 * torch.arange(count))
