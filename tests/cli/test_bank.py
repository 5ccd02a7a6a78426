"""``memlong bank``: info, verify and compact."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from memlong import SnapshotError, create_bank, load_bank
from memlong.bank.snapshot.manifest import _dumped
from memlong.bank.snapshot.tending import describe, verify
from memlong.cli.app import make_app
from memlong.corpus import Corpus
from memlong.testing.harness import random_chunks


def memlong(*arguments: object):
    return CliRunner().invoke(make_app(), ["bank", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path):
    bank = create_bank("faiss", 32, index="HNSW16", max_chunks=50)
    random_chunks(20).into(bank)
    bank.save(tmp_path / "memory")
    bank.remove([2, 4, 6])
    bank.save(tmp_path / "memory")
    return tmp_path / "memory"


def test_info_says_what_there_is(folder):
    result = memlong("info", folder)
    assert result.exit_code == 0
    assert "memlong_faiss.index:FaissIndex" in result.stdout
    assert "index=HNSW16" in result.stdout
    assert "state 2, 5 files" in result.stdout


def test_info_as_json(folder):
    found = json.loads(memlong("info", folder, "--json").stdout)
    assert found["path"] == str(folder)
    (bank,) = found["banks"]
    assert (bank["chunks"], bank["left_behind"], bank["next_id"]) == (17, 3, 20)
    assert bank["options"]["index"] == "HNSW16"
    assert (bank["chunk_shape"], bank["chunk_dtype"]) == ([2, 2, 3, 4], "float32")
    assert bank["index_bytes"] > 0
    assert (
        found["bytes"]
        == sum(path.stat().st_size for path in folder.iterdir()) - (folder / "manifest.json").stat().st_size
    )
    assert {"memlong", "torch"} <= found["versions"].keys()


def test_verify_finds_nothing_wrong(folder):
    result = memlong("verify", folder)
    assert result.exit_code == 0
    assert "all 5 files are intact" in result.stdout
    assert json.loads(memlong("verify", folder, "--json").stdout)["is_whole"] is True


@pytest.mark.parametrize("kind", ["blocks", "chunks", "state", "index", "manifest"])
def test_verify_names_the_file_that_is_not_whole(folder, kind):
    (path,) = folder.glob(f"{kind}*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    result = memlong("verify", folder)
    assert isinstance(result.exception, SnapshotError)
    assert path.name in str(result.exception)


def test_verify_tells_of_every_byte(folder):
    told = []
    verify(folder, told.append)
    assert sum(told) == describe(folder)["bytes"]


@pytest.mark.parametrize("command", ["info", "verify"])
def test_what_a_stranger_wrote_does_not_command_the_terminal(folder, command):
    path = folder / "manifest.json"
    data = json.loads(path.read_bytes())
    del data["sha256"]
    data["versions"]["\x1b[2Jmemlong"] = "\x1b]0;mine\x07"
    data["banks"][0].update(made_by="\x1b[31mx", options={"\x9b": "\x1b"}, eviction="\x1b")
    path.write_bytes(_dumped(data))
    result = memlong(command, folder)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "\x9b" not in result.stdout
    assert r"\x1b[2Jmemlong" in result.stdout


@pytest.mark.parametrize("backend", ["faiss", "hnswlib"])
def test_compact_leaves_no_embedding_of_a_removed_chunk_in_an_index(tmp_path, backend):
    bank = create_bank(backend, 32, **({"index": "HNSW16"} if backend == "faiss" else {}))
    random_chunks(20).into(bank)
    secret = bank.embeddings.embeddings[11].numpy().tobytes()
    bank.remove([11])
    bank.save(tmp_path)

    def is_there():
        return any(secret in path.read_bytes() for path in tmp_path.iterdir())

    assert is_there()
    assert memlong("compact", tmp_path).exit_code == 0
    assert not is_there()
    bank.save(tmp_path)
    assert is_there()
    bank.save(tmp_path, compact=True)
    assert not is_there()
    assert len(load_bank(tmp_path, trust_index=True)) == 19


def test_compact_leaves_only_what_is_held(folder):
    result = memlong("compact", folder, "--json")
    found = json.loads(result.stdout)
    assert found["banks"][0]["left_behind"] == 0
    assert found["bytes"] < found["bytes_before"]
    assert memlong("verify", folder).exit_code == 0
    bank = load_bank(folder, trust_index=True)
    assert bank.ids.tolist() == [each for each in range(20) if each not in (2, 4, 6)]
    assert (bank.fetch([5]).keys == 5).all()
    assert "bytes before" in memlong("compact", folder).stdout


def test_an_empty_bank_can_be_looked_after(tmp_path):
    create_bank("torch", 8).save(tmp_path)
    for command in ("info", "verify", "compact"):
        assert memlong(command, tmp_path).exit_code == 0


@pytest.mark.parametrize("command", ["info", "verify", "compact"])
def test_no_snapshot_is_said(tmp_path, command):
    result = memlong(command, tmp_path)
    assert "holds no manifest.json, so no snapshot" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["info", "verify", "compact"])
def test_the_help_holds_examples(command):
    result = memlong(command, "--help")
    assert result.exit_code == 0
    assert f"\n    memlong bank {command} memory --json\n" in result.stdout


def test_wrong_usage_exits_with_two():
    assert memlong().exit_code == memlong("nonsense").exit_code == memlong("info").exit_code == 2


@pytest.fixture
def corpus(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("word1 word2 word3", encoding="utf-8")
    words = [*arguments("remember", out="corpus", tag="short"), "a.txt"]
    assert CliRunner().invoke(make_app(), words).exit_code == 0
    return tmp_path / "corpus"


def test_info_describes_the_documents_of_a_corpus(corpus, model_folder):
    assert json.loads(memlong("info", corpus, "--json").stdout)["corpus"] == {
        "model": str(model_folder),
        "documents": 1,
        "tokens": 3,
        "bytes": next(path.stat().st_size for path in corpus.glob("documents-*")),
        "sources": ["a.txt"],
        "tags": ["short"],
    }
    shown = memlong("info", corpus).stdout
    assert "1 documents, 3 tokens" in shown
    assert "tags short" in shown
    assert "\nDocuments\n  a.txt\n" in shown


@pytest.mark.parametrize("command", ["verify", "compact"])
def test_a_corpus_can_be_looked_after(corpus, command):
    assert memlong(command, corpus).exit_code == 0
    assert memlong("info", corpus).exit_code == 0


@pytest.mark.parametrize("notes", [{}, {"model": 3}, {"model": "\x1b", "settings": []}])
def test_info_of_a_strange_corpus_is_safe(corpus, notes):
    path = corpus / "manifest.json"
    data = json.loads(path.read_bytes())
    del data["sha256"]
    data["corpus"]["notes"] = notes
    path.write_bytes(_dumped(data))
    result = memlong("info", corpus)
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "\x1b" not in result.stdout


def test_verify_reads_the_documents_of_a_corpus(corpus):
    found = Corpus.load(corpus)
    found.bank.remove([0])
    found.save()
    result = memlong("verify", corpus)
    assert isinstance(result.exception, SnapshotError)
    assert "'a.txt' of" in str(result.exception)
    assert memlong("info", corpus).exit_code == 0
