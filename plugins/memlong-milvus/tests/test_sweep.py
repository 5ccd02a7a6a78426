"""Orphans are collected, and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from memlong.bank.store.objects import LocalObjects
from memlong.errors import InvalidArgumentError
from memlong.testing.harness import DIM, random_chunks
from memlong_milvus.__main__ import main
from memlong_milvus.bank import MilvusBank
from memlong_milvus.sweep import Swept, sweep

HOUR = 3600


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A lasting local file."""
    return str(tmp_path / "memory.db")


def _with_orphans(uri: str, store: Path, **options: str) -> tuple[MilvusBank, dict[str, Path]]:
    """A bank of ten chunks of which three have lost their rows, as if it had been killed; all an hour and more old."""
    bank = MilvusBank(DIM, uri=uri, session="a", store=str(store), **options)
    chunks = random_chunks(10)
    chunks.into(bank)
    bank.rows.delete(bank.ids.numpy()[:3])
    objects = {path.name: path for path in store.rglob("*.kv")}
    for path in objects.values():
        os.utime(path, (time.time() - 2 * HOUR,) * 2)
    return bank, objects


def test_objects_without_a_row_are_removed_when_they_are_old(uri: str, tmp_path: Path) -> None:
    _, objects = _with_orphans(uri, tmp_path / "kv")
    os.utime(objects["2.kv"])
    (tmp_path / "kv" / "readme.txt").write_text("not memlong's")
    expected = Swept(orphans=2, young=1, living=7, passed_over=())
    assert sweep(str(tmp_path / "kv"), uri=uri, dry_run=True) == expected
    assert all(path.exists() for path in objects.values())
    assert sweep(str(tmp_path / "kv"), uri=uri) == expected
    assert {name for name, path in objects.items() if not path.exists()} == {"0.kv", "1.kv"}
    assert (tmp_path / "kv" / "readme.txt").exists()
    assert sweep(str(tmp_path / "kv"), uri=uri, grace=0).orphans == 1


@pytest.mark.timeout(60)
def test_an_object_named_with_a_huge_number_costs_no_more_than_another(uri: str, tmp_path: Path) -> None:
    _, objects = _with_orphans(uri, tmp_path / "kv")
    huge = objects["0.kv"].with_name(f"{10**18 - 1}.kv")
    objects["0.kv"].rename(huge)
    assert sweep(str(tmp_path / "kv"), uri=uri) == Swept(orphans=3, young=0, living=7, passed_over=())
    assert not huge.exists()


def test_collections_that_this_milvus_does_not_have_are_passed_over(uri: str, tmp_path: Path) -> None:
    """They may be another's, whose rows cannot be seen from here."""
    bank, objects = _with_orphans(uri, tmp_path / "kv", collection="mine")
    swept = sweep(str(tmp_path / "kv"), uri=str(tmp_path / "other.db"))
    assert swept == Swept(
        orphans=0, young=0, living=0, passed_over=(bank.state.store.folder.name.split("/")[0],)
    )
    assert all(path.exists() for path in objects.values())
    assert len(bank) == 10


def test_objects_of_another_milvus_stay(uri: str, tmp_path: Path) -> None:
    """Two local files share a store, and the names of collection and session."""
    bank, _ = _with_orphans(uri, tmp_path / "kv")
    other = MilvusBank(DIM, uri=str(tmp_path / "other.db"), session="a", store=str(tmp_path / "kv"))
    random_chunks(2).into(other)
    swept = sweep(str(tmp_path / "kv"), uri=str(tmp_path / "other.db"), grace=0)
    assert (swept.orphans, swept.living) == (0, 2)
    assert swept.passed_over == (bank.state.store.folder.name.split("/")[0],)
    assert bank.retrieve(random_chunks(10).embeddings[3:], 1).ids[:, 0].tolist() == list(range(3, 10))


def test_objects_that_were_never_finished_are_removed(uri: str, tmp_path: Path) -> None:
    bank, objects = _with_orphans(uri, tmp_path / "kv")
    part = objects["9.kv"].with_name(".10.kv.123.part")
    part.write_bytes(b"half")
    assert sweep(str(tmp_path / "kv"), uri=uri).young == 1
    os.utime(part, (time.time() - 2 * HOUR,) * 2)
    sweep(str(tmp_path / "kv"), uri=uri)
    assert not part.exists()
    assert bank.retrieve(random_chunks(10).embeddings[3:], 1).ids[:, 0].tolist() == list(range(3, 10))


def test_the_command_says_what_it_did(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _bank, _ = _with_orphans(uri, tmp_path / "kv")
    assert main(["sweep", "--uri", uri, "--store", str(tmp_path / "kv"), "--dry-run"]) == 0
    assert main(["sweep", "--uri", uri, "--store", str(tmp_path / "kv")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "3 orphans would be removed, 0 too young to tell, 7 in use"
    assert said[1] == "3 orphans removed, 0 too young to tell, 7 in use"


def test_the_command_says_that_a_store_cannot_be_read(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object) -> None:
        raise PermissionError("access denied to s3://me:secret@bucket/memory")

    monkeypatch.setattr(LocalObjects, "list", failing)
    assert main(["sweep", "--uri", uri, "--store", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: access denied to s3://")
    assert "secret" not in said


def test_a_sweep_without_a_milvus_removes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidArgumentError, match="sweep needs the uri"):
        sweep(str(tmp_path))
    assert main(["sweep", "--uri", "nonsense", "--store", str(tmp_path)]) == 1
    assert "uri must be the path of a file that ends in .db" in capsys.readouterr().err
