"""``memlong remember`` on a tiny random model: files and folders into a corpus, again and again."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from memlong import MemoryConfig
from memlong.bank.snapshot.manifest import _dumped
from memlong.bank.snapshot.tending import describe
from memlong.cli import choice
from memlong.cli.app import make_app
from memlong.cli.corpora import _check_fixed, notes_of
from memlong.corpus import Corpus
from memlong.errors import InvalidArgumentError, InvalidTextError, MemlongError, SnapshotError


def text_of(first, count=20):
    return " ".join(f"word{(first + number * number) % 89}" for number in range(count))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with a folder of two notes and something else in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "notes" / "b.txt").write_text(text_of(1), encoding="utf-8")
    (tmp_path / "notes" / "deep" / "a.md").write_text(text_of(2, 30), encoding="utf-8")
    (tmp_path / "notes" / "picture.png").write_bytes(b"\x89PNG\0")
    return tmp_path


@pytest.fixture
def remember(place, arguments):
    def run(*paths, **changes):
        words = arguments("remember", **{"out": "memory", **changes})
        return CliRunner().invoke(make_app(), [*words, *map(str, paths)])

    return run


def told(result):
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(result.stdout)


def test_what_is_in_a_folder_is_read_once(remember, place):
    found = told(remember("notes", json="-"))
    assert found["read"] == ["notes/b.txt", "notes/deep/a.md"]
    assert found["skipped"] == ["notes/picture.png"]
    assert (found["documents"], found["removed"], found["left_out"]) == (2, [], [])
    corpus = Corpus.load(place / "memory")
    assert found["chunks"] == len(corpus.bank) == sum(each.chunks for each in corpus.documents)
    assert corpus["notes/deep/a.md"].title == "a.md"
    assert corpus["notes/deep/a.md"].tokens == 30
    assert corpus["notes/b.txt"].time == pytest.approx((place / "notes/b.txt").stat().st_mtime)
    again = remember("notes", json="-")
    assert told(again)["unchanged"] == ["notes/b.txt", "notes/deep/a.md"]
    assert told(again)["read"] == []


def test_other_files_are_counted_and_named(remember):
    assert "1 files (notes/picture.png)" in remember("notes").stderr


def test_the_table_counts(remember):
    result = remember("notes")
    assert result.exit_code == 0, result.output
    head, row = result.stdout.splitlines()
    assert head.split() == ["read", "unchanged", "removed", "left", "out", "documents", "chunks", "bytes"]
    assert row.split()[:5] == ["2", "0", "0", "0", "2"]


def test_changed_files_are_read_again_and_gone_ones_leave(remember, place):
    told(remember("notes", json="-"))
    (place / "notes" / "b.txt").write_text(text_of(5), encoding="utf-8")
    (place / "notes" / "deep" / "a.md").unlink()
    found = told(remember("notes", json="-"))
    assert (found["read"], found["removed"]) == (["notes/b.txt"], ["notes/deep/a.md"])
    assert found["documents"] == 1


@pytest.fixture
def unloaded(monkeypatch):
    """From now on, no model can be loaded."""

    def begin():
        monkeypatch.setattr("memlong.cli.choice.load", lambda *_, **__: pytest.fail("the model was loaded"))

    return begin


def test_no_model_is_loaded_where_nothing_is_to_be_read(remember, place, unloaded):
    before = told(remember("notes", json="-"))
    generation = describe("memory")["generation"]
    unloaded()
    again = told(remember("notes", json="-"))
    assert again.keys() == before.keys()
    differs = {name for name in before if before[name] != again[name]}
    assert differs == {"read", "unchanged", "device", "retrieval_layers", "position_mode"}
    assert again["unchanged"] == before["read"]
    assert describe("memory")["generation"] == generation
    assert told(remember("notes", backend="torch", json="-"))["unchanged"] == before["read"]
    assert told(remember("notes", tag="work", json="-"))["unchanged"] == before["read"]
    assert Corpus.load(place / "memory")["notes/b.txt"].tags == ("work",)
    (place / "notes" / "b.txt").unlink()
    assert told(remember("notes", tag="work", json="-"))["removed"] == ["notes/b.txt"]


@pytest.mark.parametrize("changes", [{"retrieve_for": "all"}, {"dtype": "bfloat16"}, {"backend": "faiss"}])
def test_the_model_is_loaded_for_other_settings(remember, monkeypatch, changes):
    told(remember("notes", json="-"))
    loaded = []
    load = choice.load
    monkeypatch.setattr(choice, "load", lambda *given, **named: loaded.append(1) or load(*given, **named))
    remember("notes", **changes)
    assert loaded


def test_what_was_read_from_elsewhere_stays(remember, place, story):
    told(remember("notes", story, json="-"))
    story.unlink()
    (place / "notes" / "b.txt").unlink()
    assert told(remember("notes/deep", json="-"))["removed"] == []
    assert told(remember("notes", json="-"))["removed"] == ["notes/b.txt"]
    assert story.as_posix() in Corpus.load(place / "memory")


def test_an_empty_folder_removes_nothing(remember, place):
    told(remember("notes", json="-"))
    for path in (place / "notes").rglob("*.*"):
        path.unlink()
    result = remember("notes")
    assert isinstance(result.exception, InvalidTextError)
    assert "has no text in files named *.txt or *.md" in str(result.exception)
    assert len(Corpus.load(place / "memory")) == 2


def test_a_document_is_forgotten_without_a_model(place, remember):
    told(remember("notes", json="-"))
    words = ["remember", "--out", "memory", "--forget", "notes/b.txt", "--json", "-"]
    found = told(CliRunner().invoke(make_app(), words))
    assert (found["removed"], found["documents"]) == (["notes/b.txt"], 1)
    assert "notes/b.txt" not in Corpus.load(place / "memory")


def test_tags_and_expiry_are_kept(remember, place):
    told(remember("notes/b.txt", tag=["a", "b"], expires="2999-01-01", json="-"))
    (found,) = Corpus.load(place / "memory").documents
    assert found.tags == ("a", "b")
    assert found.expires == pytest.approx(time.mktime((2999, 1, 1, 0, 0, 0, 0, 0, -1)))


def test_what_has_expired_leaves(remember, place, monkeypatch):
    told(remember("notes/b.txt", expires="2999-01-01", json="-"))
    monkeypatch.setattr("time.time", lambda: 40e9)
    assert told(remember("notes/deep/a.md", json="-"))["removed"] == ["notes/b.txt"]


def test_what_does_not_fit_the_budget_is_left_out(remember):
    found = told(remember("notes", budget="6KB", json="-"))
    assert found["left_out"]
    assert found["bytes"] <= 6000


def test_rows_read_side_by_side(remember, place):
    apart = told(remember("notes", json="-"))
    together = told(remember("notes", out="other", rows=2, json="-"))
    assert {**together, "out": "memory"} == apart


def test_settings_come_from_the_corpus(remember, place, model_folder):
    told(remember("notes/b.txt", json="-"))
    assert Corpus.load(place / "memory").notes == {
        "model": str(model_folder),
        "settings": {
            "chunk_size": 4,
            "embedding_overlap": 0,
            "retriever": "lm",
            "retriever_options": {},
            "kv_source": "layer",
            "memory_layer": None,
            "retrieval_layers": "all",
            "retrieval_heads": "all",
            "retrieve_for": "answers",
        },
    }
    words = [
        "remember",
        "--out",
        "memory",
        "--model",
        model_folder,
        "--local-window",
        24,
        "--segment-size",
        8,
    ]
    found = told(CliRunner().invoke(make_app(), [*map(str, words), "notes/deep/a.md", "--json", "-"]))
    assert (found["chunk_size"], found["dtype"], found["documents"]) == (4, "float32", 2)


def test_a_corpus_goes_on_with_the_overlap_it_was_read_with(remember, place, model_folder):
    sizes = ["--local-window", 24, "--segment-size", 8, "--json", "-"]
    told(remember("notes/b.txt", embedding_overlap=2, json="-"))
    words = ["remember", "--out", "memory", "--model", model_folder, "notes/deep/a.md", *sizes]
    assert told(CliRunner().invoke(make_app(), [*map(str, words)]))["embedding_overlap"] == 2
    corpus = Corpus.load(place / "memory")
    assert corpus.notes["settings"]["embedding_overlap"] == 2
    told(remember("notes/b.txt", out="without", chunk_size=8, embedding_overlap=0, json="-"))
    corpus = Corpus.load(place / "without")
    del corpus.notes["settings"]["embedding_overlap"]  # as if read before there was one
    corpus.save()
    words = ["remember", "--out", "without", "--model", model_folder, "notes/deep/a.md", *sizes]
    assert told(CliRunner().invoke(make_app(), [*map(str, words)]))["embedding_overlap"] == 0


def test_why_it_is_this_dtype_is_said(remember, model_folder):
    assert "float32 on cpu (as asked)" in remember("notes/b.txt", device="cpu").stderr
    assert "float32 on cpu (as memory was read)" in remember("notes", dtype="auto", device="cpu").stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"chunk_size": 8},
            "--chunk-size must be 4, with which 'memory' was read, got 8: leave it out, or use another --out",
        ),
        ({"embedding_overlap": 2}, "--embedding-overlap must be 0, with which"),
        ({"retriever": "random"}, "--retriever must be lm, with which"),
        ({"kv_source": "shared"}, "--kv-source must be layer, with which"),
        ({"retrieval_layers": "1-2"}, "--retrieval-layers must be all, with which"),
    ],
)
def test_other_settings_are_refused_before_the_model_is_loaded(remember, unloaded, changes, message):
    told(remember("notes/b.txt", json="-"))
    unloaded()
    result = remember("notes", **changes)
    assert isinstance(result.exception, InvalidArgumentError)
    assert message in str(result.exception)


def test_settings_that_are_those_of_the_corpus_may_be_given(remember):
    same = {"kv_source": "shared", "retrieval_layers": "1-2"}
    told(remember("notes/b.txt", json="-", **same))
    assert told(remember("notes", json="-", **same))["read"] == ["notes/deep/a.md"]
    result = remember("notes", memory_layer=1, **same)
    assert "--memory-layer must be the default, with which" in str(result.exception)


def test_a_retriever_may_be_elsewhere_on_this_machine(remember, place, model_folder):
    """It is checked by what its embeddings are, once it is loaded."""
    notes = notes_of(place / told(remember("notes/b.txt", json="-"))["out"])
    elsewhere = replace(notes, settings={**notes.settings, "retriever": "/home/else/minilm"})
    config = MemoryConfig(retriever="someone/minilm")
    _check_fixed(elsewhere, config, {"retriever"}, "--out")
    with pytest.raises(InvalidArgumentError, match="--retriever must be lm"):
        _check_fixed(notes, config, {"retriever"}, "--out")


def test_a_folder_of_other_things_is_refused_before_the_model_is_loaded(remember, unloaded):
    unloaded()
    result = remember("notes/b.txt", out="notes")
    assert isinstance(result.exception, SnapshotError)
    assert "is not part of a snapshot" in str(result.exception)


def test_a_corpus_names_no_place_of_this_machine(remember):
    told(remember("notes/b.txt", json="-"))
    result = CliRunner().invoke(make_app(), ["remember", "--out", "memory", "notes"])
    assert isinstance(result.exception, InvalidArgumentError)
    assert "a place on this machine, which no file may choose" in str(result.exception)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retriever": "someone/else"}, "which no file may choose"),
        ({"store": {"disk": "/"}}, "has notes that cannot be read"),
        ({"chunk_size": "many"}, "chunk_size"),
        ([], "has notes that cannot be read"),
    ],
)
def test_what_a_stranger_wrote_is_checked(remember, place, model_folder, settings, message):
    told(remember("notes/b.txt", json="-"))
    path = place / "memory" / "manifest.json"
    data = json.loads(path.read_bytes())
    del data["sha256"]
    data["corpus"]["notes"]["settings"] = settings
    path.write_bytes(_dumped(data))
    words = ["remember", "--out", "memory", "--model", str(model_folder), "notes"]
    result = CliRunner().invoke(make_app(), words)
    assert isinstance(result.exception, MemlongError)
    assert message in str(result.exception)


def test_another_backend_stays_what_it_was(remember, place):
    told(remember("notes/b.txt", backend="faiss", json="-"))
    told(remember("notes/deep/a.md", json="-"))
    assert type(Corpus.load(place / "memory").bank.index).__module__ == "memlong_faiss.index"


@pytest.mark.parametrize(
    ("paths", "changes", "error", "message"),
    [
        ([], {}, InvalidArgumentError, "There is nothing to read"),
        (["none.txt"], {}, InvalidTextError, "'none.txt' does not exist"),
        (["notes"], {"expires": "soon"}, InvalidArgumentError, "--expires must be an ISO date"),
        (["notes"], {"expires": "1999-01-01"}, InvalidArgumentError, "--expires must be in the future"),
        (["notes"], {"forget": "x"}, InvalidArgumentError, "--forget must name a document of 'memory'"),
        (["notes"], {"budget": "much"}, InvalidArgumentError, "--budget"),
        (["notes"], {"backend": "none"}, InvalidArgumentError, "--backend must name a backend"),
        (["notes"], {"out": "bank"}, SnapshotError, "holds the snapshot of a bank, and no corpus"),
    ],
)
def test_bad_input_is_named_with_what_to_do(remember, place, paths, changes, error, message):
    from memlong import create_bank

    create_bank("torch", 8).save(place / "bank")
    result = remember(*paths, **changes)
    assert isinstance(result.exception, error), result.output
    assert message in str(result.exception)


def test_the_corpus_in_a_folder_that_is_read_is_no_document(remember, place):
    found = told(remember("notes", out="notes/.memory", json="-"))
    assert told(remember("notes", out="notes/.memory", json="-"))["skipped"] == found["skipped"]
