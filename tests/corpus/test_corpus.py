"""A corpus reads each document as a text of its own, goes on where it stopped, and truly forgets."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memlong import LayeredBank, MemoryDecoder, SnapshotError, create_bank, load_bank
from memlong.bank.snapshot.lazy import SnapshotStore
from memlong.bank.snapshot.manifest import _dumped
from memlong.bank.snapshot.tending import describe, verify
from memlong.bank.snapshot.writer import SnapshotWriter
from memlong.corpus import About, Corpus, Document, Remembered, reading, remember, table
from memlong.corpus.table import check_documents, list_documents
from memlong.decoder import Passage
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.testing.harness import DIM, random_chunks


@pytest.fixture
def tokenizer():
    words = {"\n": 3, **{f"w{number}": number for number in range(4, 60)}, "?": 2}
    tokens = Tokenizer(models.WordLevel(words, "?"))
    tokens.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="?")


@pytest.fixture
def decoder(llama, tokenizer, small):
    return MemoryDecoder(llama, tokenizer, small())


def words(count, seed):
    chosen = np.random.default_rng(seed).integers(4, 60, count)
    return " ".join(f"w{each}" for each in chosen)


def documents(*sizes, first=0):
    return [Document(f"{number}.txt", words(size, number)) for number, size in enumerate(sizes, start=first)]


def read(decoder, corpus, given, **options):
    with decoder:
        return remember(decoder, corpus, given, **options)


def content(corpus, source):
    document = corpus[source]
    return corpus.bank.fetch(list(range(document.first_id, document.first_id + document.chunks)))


def test_every_token_is_in_a_chunk_and_every_chunk_in_its_document(decoder, tmp_path):
    corpus = Corpus.open(tmp_path / "c", decoder)
    sizes = (1, 3, 4, 5, 61)
    assert read(decoder, corpus, documents(*sizes)).read == [f"{n}.txt" for n in range(5)]
    for number, size in enumerate(sizes):
        document = corpus[f"{number}.txt"]
        assert document.tokens == size
        assert document.chunks == -(-size // 4)
        ids = range(document.first_id, document.first_id + document.chunks)
        assert all(corpus.document_of(each) == document for each in ids)
        spans = [document.span_in_text(*span) for span in corpus.bank.spans_of(list(ids)).tolist()]
        assert [place for span in spans for place in range(*span)] == [*range(size)]
        said = " ".join(decoder.tokenizer.convert_ids_to_tokens(corpus.tokens_of(document.source).tolist()))
        assert said == words(size, number)
    assert corpus.document_of(corpus.bank.next_id) is None
    assert len(corpus) == 5


@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_remembered_of_a_document_does_not_depend_on_others(decoder, tmp_path, rows):
    both = Corpus.open(tmp_path / "both", decoder)
    read(decoder, both, documents(50, 31, 9), rows=rows)
    for number, size in enumerate((50, 31, 9)):
        alone = Corpus.open(tmp_path / f"alone {number}", decoder)
        read(decoder, alone, documents(size, first=number))
        expected, found = content(alone, f"{number}.txt"), content(both, f"{number}.txt")
        torch.testing.assert_close(found.keys, expected.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.values, expected.values, atol=1e-5, rtol=0)
        assert torch.equal(found.spans, expected.spans)


def test_the_last_chunk_is_found_by_as_much_text_as_the_others(llama, tokenizer, small, tmp_path):
    decoder = MemoryDecoder(llama, tokenizer, small(retriever="lm"))
    corpus = Corpus.open(tmp_path, decoder)
    given = documents(17, 2, 20)
    read(decoder, corpus, given)
    sinks, size = decoder.config.sink_tokens, decoder.config.chunk_size
    for document, count in zip(given, (17, 2, 20), strict=True):
        found = corpus[document.source]
        lead = [3] * found.lead  # line ends
        text = [*lead, *corpus.tokens_of(document.source).tolist()]
        passages = [
            Passage(tuple(text[start : start + size]), start)
            for start in range(sinks, len(text) - size + 1, size)
        ]
        if (len(text) - sinks) % size:
            start = max(sinks, len(text) - size)
            passages.append(Passage(tuple(text[start:]), start))
        assert len(passages) == found.chunks == -(-(found.lead + count - sinks) // size)
        expected = torch.nn.functional.normalize(decoder.retriever.embed_chunks(passages), dim=1)
        held = corpus.bank.embeddings.embeddings[found.first_id : found.first_id + found.chunks]
        torch.testing.assert_close(held, expected)
        assert corpus.bank.exact_search(expected[-1:], 1).ids.item() == found.first_id + found.chunks - 1


def test_only_what_has_changed_is_read_again(decoder, tmp_path):
    first, second, third = documents(20, 30, 10)
    read(decoder, Corpus.open(tmp_path, decoder), [first, second, third])
    corpus = Corpus.open(tmp_path, decoder)
    changed = replace(second, text=words(33, 9))
    outcome = read(decoder, corpus, [first, changed, replace(third, title="Third", tags=("a",))])
    assert (outcome.read, outcome.unchanged) == (["1.txt"], ["0.txt", "2.txt"])
    again = Corpus.load(tmp_path)
    assert again.documents == corpus.documents
    assert again["2.txt"].title == "Third"
    assert again["1.txt"].tokens == 33
    assert len(again.bank) == 5 + 9 + 3
    assert describe(tmp_path)["banks"][0]["left_behind"] == 0
    verify(tmp_path)


def test_forgetting_leaves_nothing_in_the_folder(decoder, tmp_path):
    corpus = Corpus.open(tmp_path, decoder)
    read(decoder, corpus, documents(20, 30))
    keys = content(corpus, "0.txt").keys.numpy().tobytes()[:64]
    tokens = corpus.tokens_of("0.txt").numpy().astype(np.int32).tobytes()

    def on_disk():
        return b"".join(path.read_bytes() for path in tmp_path.iterdir())

    assert keys in on_disk()
    assert tokens in on_disk()
    corpus = Corpus.load(tmp_path)
    corpus.forget("0.txt")
    corpus.save()
    assert keys not in on_disk()
    assert tokens not in on_disk()
    assert b"0.txt" not in on_disk()
    assert [each.source for each in Corpus.load(tmp_path).documents] == ["1.txt"]
    with pytest.raises(InvalidArgumentError, match=r"no document of the source '0\.txt'"):
        corpus.forget("0.txt")


def test_filters_and_lifetimes(decoder, tmp_path):
    one, two, three = documents(8, 4, 12)
    corpus = Corpus.open(tmp_path, decoder)
    given = [
        replace(one, tags=("a", "b"), time=100.0),
        replace(two, tags=("a",), time=200.0, expires=1000.0),
        three,
    ]
    read(decoder, corpus, given)
    for name, options, expected in [
        ("all", {"now": 0}, [0, 1, 2, 3, 4, 5]),
        ("tag", {"tags": ["a"], "now": 0}, [0, 1, 2]),
        ("tags", {"tags": ["a", "b"], "now": 0}, [0, 1]),
        ("since", {"since": 150, "now": 0}, [2]),
        ("until", {"until": 200, "now": 0}, [0, 1]),
        ("source", {"sources": ["2.txt"]}, [3, 4, 5]),
        ("expired", {"now": 1000}, [0, 1, 3, 4, 5]),
    ]:
        assert corpus.ids(**options).tolist() == expected, name
    with pytest.raises(InvalidArgumentError, match="must be sequences"):
        corpus.ids(tags="a")
    session = LayeredBank(decoder.new_bank(), [corpus.bank], among=[corpus.ids(tags=["b"])])
    decoder.reset(banks=[session])
    with decoder:
        found = [each.retrievals[0] for each in decoder.stream(torch.randint(4, 60, (1, 30)))]
    assert {each for some in found if some for each in some.ids.tolist()} <= {
        0,
        1,
        *range(1 << 52, (1 << 52) + 99),
    }
    assert corpus.expire(now=1000.0) == ["1.txt"]
    assert "1.txt" not in corpus


def test_a_budget_leaves_documents_out(decoder, tmp_path):
    corpus = Corpus.open(tmp_path, decoder)
    one = decoder.layout.nbytes + 4 * corpus.bank.dim
    outcome = read(decoder, corpus, documents(20, 30, 4), budget=6 * one)
    assert (outcome.read, outcome.left_out) == (["0.txt", "2.txt"], ["1.txt"])
    assert corpus.bank.nbytes == 6 * one


def test_keys_and_values_rest_on_disk_once_saved(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_AT_ONCE", 1)
    corpus = Corpus.open(tmp_path, decoder)
    read(decoder, corpus, documents(20, 30))
    assert isinstance(corpus.bank.state.store, SnapshotStore)
    assert corpus.bank.state.store.resident_bytes == 0
    assert corpus.bank.nbytes > 0
    assert torch.isfinite(content(corpus, "1.txt").keys).all()


def test_what_was_cut_off_leaves_no_trace_and_is_read_again(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_PATIENCE", 0)
    given = documents(20, 30, 10)
    corpus = Corpus.open(tmp_path, decoder)
    asked = 0

    def stop(document, tokens):
        nonlocal asked
        asked += 1
        if document.source == "2.txt":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(decoder, corpus, given, progress=stop)
    assert asked
    again = Corpus.open(tmp_path, decoder)
    outcome = read(decoder, again, given)
    assert (outcome.unchanged, outcome.read) == (["0.txt", "1.txt"], ["2.txt"])
    assert len(again.bank) == 5 + 8 + 3


def test_another_process_is_not_overwritten(decoder, tmp_path):
    read(decoder, Corpus.open(tmp_path, decoder), documents(20, 30))
    ours, theirs = Corpus.load(tmp_path), Corpus.load(tmp_path)
    theirs.forget("0.txt")
    theirs.save()
    assert torch.isfinite(content(ours, "0.txt").keys).all()  # it still reads what it has opened
    with pytest.raises(SnapshotError, match="was changed since this corpus was loaded"):
        read(decoder, ours, iter([pytest.fail] * 2))  # before anything is read
    with pytest.raises(SnapshotError, match="was changed since this corpus was loaded"):
        ours.save()
    assert [each.source for each in Corpus.load(tmp_path).documents] == ["1.txt"]


def test_bad_input_is_named(decoder, tiny_model, tokenizer, small, tmp_path):
    corpus = Corpus.open(tmp_path, decoder)
    twice = documents(5)[0]
    with pytest.raises(InvalidArgumentError, match=r"two of the source '0\.txt'"):
        read(decoder, corpus, [twice, twice])
    with pytest.raises(InvalidArgumentError, match="must hold a Document each"):
        read(decoder, corpus, ["text"])
    with pytest.raises(InvalidArgumentError, match="decoder must have a tokenizer"):
        read(MemoryDecoder(decoder.model, None, small()), corpus, documents(5))
    with pytest.raises(MemlongError, match="not attached"):
        remember(decoder, corpus, documents(5, first=9))
    read(decoder, corpus, documents(5, first=9))
    other = MemoryDecoder(tiny_model(seed=3), tokenizer, small())
    with pytest.raises(InvalidArgumentError, match="another model filled"):
        read(other, Corpus.open(tmp_path, other), documents(4, first=5))
    corpus.bank.save(tmp_path / "bank")
    with pytest.raises(SnapshotError, match="holds the snapshot of a bank, and no corpus"):
        Corpus.load(tmp_path / "bank")
    with pytest.raises(SnapshotError, match="holds a corpus, and no streams"):
        decoder.restore(tmp_path)
    for wrong, message in [
        ({"source": ""}, "source must not be empty"),
        ({"source": "a", "tags": "b"}, "tags must be a sequence"),
        ({"source": "a", "tags": ["b"] * 257}, "tags must be at most 256 words"),
        ({"source": "a", "time": float("nan")}, "time must be seconds"),
        ({"source": "a", "time": 10**400}, "time must be seconds"),
        ({"source": "a", "title": 3}, "title must be text"),
        ({"source": "a", "text": None}, "text must be text"),
    ]:
        with pytest.raises(InvalidArgumentError, match=message):
            Document(**{"text": "", **wrong})
    with pytest.raises(InvalidArgumentError, match="path must name a folder"):
        Corpus(decoder.new_bank()).save()


def test_a_corpus_can_be_loaded_as_a_bank(decoder, tmp_path):
    read(decoder, Corpus.open(tmp_path, decoder, {"model": "tiny"}), documents(20))
    assert len(load_bank(tmp_path, lazy=True)) == 5
    assert Corpus.load(tmp_path).notes == {"model": "tiny"}
    decoder.reset(bases=[Corpus.load(tmp_path).bank])
    with decoder:
        decoder.read(torch.randint(4, 60, (1, 30)))
    assert isinstance(decoder.banks[0], LayeredBank)


KILLED = """
import sys
from memlong.corpus import Corpus
from memlong.bank.snapshot import writer
import os
corpus = Corpus.load(sys.argv[1])
corpus.forget("0.txt")
writer.SnapshotWriter.commit = lambda *_, **__: os.kill(os.getpid(), 9)
corpus.save()
"""


def test_it_is_whole_after_a_kill(decoder, tmp_path):
    read(decoder, Corpus.open(tmp_path, decoder), documents(20, 30))
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert ended.returncode == -9
    corpus = Corpus.load(tmp_path)
    assert len(corpus) == 2
    verify(tmp_path)
    corpus.forget("0.txt")
    corpus.save()
    assert len(Corpus.load(tmp_path)) == 1


def test_what_an_error_cuts_short_is_saved_up_to_there(decoder, tmp_path):
    def some():
        yield from documents(20, 30)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        read(decoder, Corpus.open(tmp_path, decoder), some())
    assert len(Corpus.load(tmp_path)) == 2


def test_a_changed_document_rewrites_what_was_saved_with_it_alone(decoder, tmp_path):
    for number in range(4):
        read(decoder, Corpus.open(tmp_path, decoder), documents(20, first=number))
    before = {path.name for path in tmp_path.glob("blocks-*")}
    corpus = Corpus.load(tmp_path)
    read(decoder, corpus, [replace(documents(20)[0], text=words(20, 9))])
    after = {path.name for path in tmp_path.glob("blocks-*")}
    assert (len(before), len(after), len(before & after)) == (4, 4, 3)
    assert corpus.bank.open_files == 4
    assert torch.isfinite(content(corpus, "3.txt").keys).all()


def test_banks_that_evict_are_refused(llama, tokenizer, small, tmp_path):
    limited = MemoryDecoder(llama, tokenizer, small(backend_options={"max_chunks": 6}))
    with pytest.raises(InvalidArgumentError, match="a corpus keeps every document"):
        Corpus.open(tmp_path, limited)


def test_a_document_without_its_chunks_is_read_again(decoder, tmp_path):
    corpus = Corpus.open(tmp_path, decoder)
    read(decoder, corpus, documents(20))
    corpus.bank.remove([2])
    assert read(decoder, corpus, documents(20)).read == ["0.txt"]
    assert len(corpus.bank) == 5


@pytest.mark.parametrize(
    "forged",
    [
        {"chunks": 2**40},
        {"first_id": 0},
        {"digest": "x"},
        {"time": True},
        {"tags": {}},
        {"lead": -1},
        {"tokens": 1.0},
        {"source": "0.txt"},
    ],
)
def test_documents_that_cannot_be_are_refused(decoder, tmp_path, monkeypatch, forged):
    corpus = Corpus.open(tmp_path, decoder)
    read(decoder, corpus, documents(20, 30))
    as_json = Remembered.as_json
    monkeypatch.setattr(
        Remembered, "as_json", lambda each: as_json(each) | (forged if each.source == "1.txt" else {})
    )
    corpus.save(tmp_path / "forged")
    with pytest.raises(SnapshotError, match=r"describes no documents"):
        Corpus.load(tmp_path / "forged")


def in_file(monkeypatch, change):
    """Have the next file of documents hold this change of what is said of them."""
    write = SnapshotWriter.write

    def written(writer, kind, content, *rest):
        if kind == "documents":
            arrays = safetensors.numpy.load(content)
            content = safetensors.numpy.save(change(dict(arrays)))
        return write(writer, kind, content, *rest)

    monkeypatch.setattr(SnapshotWriter, "write", written)


def as_bytes(text):
    return np.frombuffer(text, dtype=np.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: {**found, "documents": found["documents"][::-1].copy()}, "describes no documents"),
        (lambda found: {**found, "documents": found["documents"] | 128}, "describes no documents"),
        (lambda found: {**found, "documents": as_bytes(b"[" * found["documents"].size)}, "describes no doc"),
        (lambda found: {**found, "documents": as_bytes(b"1" * found["documents"].size)}, "describes no doc"),
        (lambda found: {**found, "documents": found["documents"][:-1]}, "instead of uint8"),
        (lambda found: {**found, "tokens": found["tokens"].astype(np.float32)}, "instead of int32"),
        (lambda found: {**found, "tokens": -1 - found["tokens"]}, "a token id is below 0"),
        (lambda found: {"tokens": found["tokens"]}, "is said to have|holds tokens instead"),
    ],
)
def test_a_file_of_documents_that_cannot_be_is_refused(decoder, tmp_path, monkeypatch, change, message):
    corpus = Corpus.open(tmp_path / "c", decoder)
    read(decoder, corpus, documents(20, 30))
    in_file(monkeypatch, change)
    corpus.save(tmp_path / "forged")
    for look in (Corpus.load, list_documents, lambda path: verify(path, check_documents=check_documents)):
        with pytest.raises(SnapshotError, match=message):
            look(tmp_path / "forged")


def test_a_save_writes_only_documents_that_are_new_or_have_changed(decoder, tmp_path):
    def on_disk():
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("documents-*")}

    corpus = Corpus.open(tmp_path, decoder)
    read(decoder, corpus, documents(20, 30))
    (first,) = before = on_disk()
    read(decoder, corpus, documents(10, first=2))
    assert len(on_disk()) == 2
    assert on_disk()[first] == before[first]
    corpus = Corpus.load(tmp_path)
    corpus.change(About("2.txt", title="Third"))
    corpus.save()
    assert len(on_disk()) == 2
    assert on_disk()[first] == before[first]
    corpus.forget("0.txt")
    corpus.save()
    assert first not in on_disk()
    assert [each.source for each in Corpus.load(tmp_path).documents] == ["1.txt", "2.txt"]
    assert [each.title for each in Corpus.load(tmp_path).documents] == ["", "Third"]


def test_many_small_files_of_documents_become_one(tmp_path):
    corpus = Corpus(create_bank("torch", DIM))
    for number in range(40):
        one = create_bank("torch", DIM)
        random_chunks(1, seed=number).into(one)
        corpus.add(Document(f"{number}.txt", ""), one, tokens=[number], lead=0)
        corpus.save(tmp_path)
    assert 5 < len(list(tmp_path.glob("documents-*"))) <= 33
    again = Corpus.load(tmp_path)
    assert [again.tokens_of(each.source).tolist() for each in again.documents] == [[n] for n in range(40)]


def test_a_large_table_of_documents_is_in_several_files(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "_PART_BYTES", 300)
    corpus = Corpus.open(tmp_path, decoder)
    read(decoder, corpus, documents(5, 5, 5, 5, 5))
    assert len(list(tmp_path.glob("documents-*"))) > 1
    assert Corpus.load(tmp_path).documents == corpus.documents


def test_any_source_is_kept(decoder, tmp_path):
    odd = ["ä", "\udcff", "\U0001f433", "\n\x01"]
    corpus = Corpus.open(tmp_path, decoder)
    read(decoder, corpus, [replace(documents(5)[0], source=each) for each in odd])
    assert [each.source for each in Corpus.load(tmp_path).documents] == odd


def test_what_was_written_before_documents_had_files_is_refused_by_name(decoder, tmp_path):
    read(decoder, Corpus.open(tmp_path, decoder), documents(5))
    path = tmp_path / "manifest.json"
    data = json.loads(path.read_bytes())
    del data["sha256"], data["corpus"]
    path.write_bytes(_dumped(data))
    for look in (Corpus.load, list_documents, load_bank, describe):
        with pytest.raises(SnapshotError, match=r"from before the first release.*Read the texts again"):
            look(tmp_path)


def test_verify_checks_that_documents_and_chunks_fit(decoder, tmp_path, monkeypatch):
    corpus = Corpus.open(tmp_path, decoder)
    read(decoder, corpus, documents(20, 30))
    verify(tmp_path, check_documents=check_documents)
    corpus.bank.remove([2])
    corpus.save()
    verify(tmp_path)
    with pytest.raises(
        SnapshotError, match=r"'0\.txt'.*has 5 chunks, of which the bank holds 4: read it again"
    ):
        verify(tmp_path, check_documents=check_documents)
    read(decoder, corpus, documents(20, 30))
    verify(tmp_path, check_documents=check_documents)
    as_json = Remembered.as_json
    monkeypatch.setattr(Remembered, "as_json", lambda each: as_json(each) | {"lead": 0, "tokens": 9})
    corpus._documents = {name: replace(each, tokens=9) for name, each in corpus._documents.items()}
    corpus._tokens = {name: each[:9] for name, each in corpus._tokens.items()}
    corpus.save()
    with pytest.raises(SnapshotError, match=r"has 9 tokens, but chunks of what follows them"):
        verify(tmp_path, check_documents=check_documents)


def test_it_is_saved_to_two_folders_in_turn(decoder, tmp_path):
    corpus = Corpus.open(tmp_path / "a", decoder)
    read(decoder, corpus, documents(20, 30))
    corpus.save(tmp_path / "b")
    corpus.forget("0.txt")
    corpus.save(tmp_path / "a")
    corpus.save(tmp_path / "b")
    corpus.save(tmp_path / "a")
    for each in "ab":
        verify(tmp_path / each, check_documents=check_documents)
        assert [every.source for every in Corpus.load(tmp_path / each).documents] == ["1.txt"]
        assert describe(tmp_path / each)["banks"][0]["left_behind"] == 0
    Corpus.load(tmp_path / "b").save()
    with pytest.raises(SnapshotError, match="was changed since this corpus was loaded"):
        corpus.save(tmp_path / "b")
