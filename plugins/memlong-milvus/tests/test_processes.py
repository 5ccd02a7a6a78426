"""Two processes at one place, at the same time."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
from milvus_server import Server

from memlong.testing.harness import DIM, random_chunks
from memlong_milvus.bank import MilvusBank

_STREAM = """
import json, sys, torch
from memlong.testing.harness import random_chunks
from memlong_milvus.bank import MilvusBank
place, session, offset = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
bank = MilvusBank(32, session=session, **place)
seen = set()
for turn in range(40):
    chunks = random_chunks(5, seed=turn, first=offset + 5 * turn)  # the same embeddings in both, other numbers
    chunks.into(bank)
    got = bank.retrieve(chunks.embeddings, 20)
    seen |= set(got.keys[got.found][:, 0, 0, 0, 0].long().tolist())
    if turn % 10 == 9:
        bank.remove(bank.ids[:7])
print(json.dumps([sorted(seen), bank.ids.tolist()]))
"""


@pytest.mark.server
def test_two_sessions_of_two_processes_never_see_each_others_chunks(server: Server, tmp_path: Path) -> None:
    """They begin together: both find no collection, and both write the same embeddings."""
    place = {"uri": server.uri, "store": str(tmp_path), "collection": "both"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _STREAM, json.dumps(place), f"s{offset}", str(offset)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for offset in (0, 1000)
    ]
    for offset, process in zip((0, 1000), running, strict=True):
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0
        seen, held = json.loads(said)
        assert set(seen) <= set(range(offset, offset + 200))
        assert len(seen) > 150
        assert held == list(range(28, 200))
        bank = MilvusBank.reopen(DIM, session=f"s{offset}", **place)
        assert bank.ids.tolist() == held
        assert bank.fetch(bank.ids).keys[:, 0, 0, 0, 0].tolist() == [offset + each for each in held]


@pytest.mark.slow
def test_a_local_file_is_one_processs(tmp_path: Path) -> None:
    place = {"uri": str(tmp_path / "memory.db"), "session": "a"}
    bank = MilvusBank(DIM, **place)
    script = f"from memlong_milvus.bank import MilvusBank; MilvusBank({DIM}, **{place!r})"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert "Is another process using the file?" in other.stderr.splitlines()[-1]
    assert len(bank) == 0


@pytest.mark.slow
def test_a_closed_bank_lets_go_of_its_local_file(tmp_path: Path) -> None:
    """When it is the last one: another process can then use the file while this one still runs, and this one again."""
    place = {"uri": str(tmp_path / "memory.db")}
    bank, other = MilvusBank(DIM, **place, session="a"), MilvusBank(DIM, **place)
    random_chunks(3).into(bank)
    script = (
        "from memlong.testing.harness import random_chunks; from memlong_milvus.bank import MilvusBank\n"
        f"bank = MilvusBank.reopen({DIM}, **{place!r}, session='a')\n"
        "random_chunks(2, seed=1, first=3).into(bank)\n"
    )
    bank.close()
    refused = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "Is another process using the file?" in refused.stderr
    other.close()
    subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    with MilvusBank.reopen(DIM, **place, session="a") as again:
        assert again.retrieve(random_chunks(3).embeddings, 1).ids[:, 0].tolist() == [0, 1, 2]
        assert len(again.fetch(again.ids).keys) == 5


@pytest.mark.slow
@pytest.mark.parametrize("session", ["a", None])
def test_a_collected_bank_lets_go_of_its_local_file(tmp_path: Path, session: str | None) -> None:
    place = {"uri": str(tmp_path / "memory.db")}
    bank = MilvusBank(DIM, **place, session="a")
    random_chunks(3).into(bank)
    bank.close()
    bank = MilvusBank(DIM, **place, session=session, resume=session is not None)
    random_chunks(2, seed=1, first=3).into(bank)
    del bank
    gc.collect()
    script = (
        "from memlong_milvus.bank import MilvusBank\n"
        f"print(len(MilvusBank.reopen({DIM}, **{place!r}, session='a')))\n"
    )
    for _ in range(5):  # another thread closes the file
        other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        if not other.returncode:
            break
    assert other.stdout.strip() == ("5" if session else "3"), other.stderr
