"""The bench of two books: its questions, RAG as text over corpora, and what it measures."""

from __future__ import annotations

import json
import random
import string
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from memlong.cli.app import make_app
from memlong.corpus import Corpus
from memlong.errors import InvalidArgumentError
from tests.test_bench_results import measured, script

_WORDS = [f"{first}{second}" for first in "bdfgklmnprstvz" for second in ("ale", "ure", "one", "ick")]
NAMES = ["Ahab", "Starbuck", "Queequeg", "Pequod", "Nantucket", "Tashtego"]


def book(seed, paragraphs=24):
    """Sentences of made-up words, some with a name or a number."""
    draw = random.Random(seed)  # noqa: S311 - not for cryptography

    def sentence():
        tokens = [draw.choice(_WORDS) for _ in range(16)]
        tokens[0] = tokens[0].capitalize()
        tokens[13] = draw.choice([draw.choice(NAMES), str(draw.randrange(100)), "twenty-five", tokens[13]])
        return " ".join(tokens) + "."

    return "\n\n".join(" ".join(sentence() for _ in range(5)) for _ in range(paragraphs)) + "\n"


@pytest.fixture(scope="module")
def books():
    return {"one": book(1), "two": book(2)}


@pytest.fixture(scope="module")
def long_books():
    return {"one": book(1, 100), "two": book(2, 100)}


@pytest.fixture(scope="module")
def bench():
    return script("book_questions")


def test_questions_are_of_every_kind_and_of_both_books(bench, long_books):
    found = bench.questions(long_books, 10)
    assert bench.shares(found) == {"next line": 8, "number": 6, "name": 6}
    assert {each.book for each in found} == {"one", "two"}
    assert found == bench.questions(long_books, 10)
    for each in found:
        whole = " ".join(long_books[each.book].split())
        assert whole.count(each.cue) == 1
        after = whole[whole.index(each.cue) + len(each.cue) :]
        assert each.is_answered_by(after)
        assert f"{each.cue} " in each.passage
        assert each.answer.casefold() not in bench.words(each.cue)


def test_skipped_questions_are_others(bench, long_books):
    first, others = bench.questions(long_books, 10), bench.questions(long_books, 10, skip=4)
    assert len(others) == 20
    assert not {each.passage for each in first} & {each.passage for each in others}


@pytest.mark.parametrize(
    ("answer", "said", "right"),
    [
        ("Ahab", ' "Ahab\u2019s ship', True),
        ("Ahab", " Ahabs ship", False),
        ("60,000", " 60,000, or", True),
        ("60,000", " 60,000,000", False),
        ("25", " $25 a day", True),
        ("three", " three-fourths", False),
        ("But, though for ever mounted on", "\nBut though—for ever mounted on it", True),
        ("But, though for ever mounted on", " But though for", False),
    ],
)
def test_an_answer_is_right_word_by_word(bench, answer, said, right):
    question = bench.Question("one", "name", "cue", answer, "passage")
    assert question.is_answered_by(said) is right


@pytest.mark.parametrize(
    ("token", "kind"),
    [("Nantucket", "name"), ("forty-one", "number"), ("$12,500", "number"), ("Captain", None), ("won", None)],
)
def test_a_name_is_never_a_common_word_and_a_number_is_one(bench, token, kind):
    start = "One day in the month of that year we saw the"
    text = f"It was the captain. {start} {token} and went. {' '.join(_WORDS[:9]).capitalize()}."
    found = [each for each in bench._candidates("one", text, frozenset({"captain"})) if each.cue == start]
    assert [each.kind for each in found] == ([kind] if kind else [])


@pytest.fixture
def model(tmp_path, llama):
    """A tiny random model of characters, in a folder."""
    llama.config.max_position_embeddings = 4096
    llama.save_pretrained(tmp_path / "model")
    letters = {
        letter: 3 + number for number, letter in enumerate("\n $,-." + string.ascii_letters + string.digits)
    }
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, **letters}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def corpora(tmp_path, monkeypatch, books, model):
    monkeypatch.chdir(tmp_path)
    for name, text in books.items():
        path = tmp_path / f"{name}.txt"
        path.write_text(text, encoding="utf-8")
        typed = ["remember", "--model", model, "--dtype", "float32", "--out", name, path.name]
        result = CliRunner().invoke(make_app(), [*typed, "--chunk-size", "32"])
        assert result.exit_code == 0, result.output
    return ["--memory", "one", "--memory", "two", "--model", model]


def test_passages_that_are_found_stand_before_the_prompt(corpora, tmp_path, bench, books):
    (question, *_) = bench.questions(books, 3)
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([question.cue]), encoding="utf-8")
    path = tmp_path / "found.json"
    typed = [*corpora, "--prompts", prompts, "--max-new-tokens", 3]
    _, alone = measured("passages", path, *typed, "--top-k", 0)
    _, found = measured("passages", path, *typed, "--top-k", 4)
    (plain,), (answer,) = alone["answers"], found["answers"]
    assert plain["passages"] == []
    texts = answer["passages"]
    assert 1 <= len(texts) <= 4
    wholes = [text.strip() for text in books.values()]
    assert all(any(text.strip() in whole for whole in wholes) for text in texts)
    assert answer["prompt_tokens"] == plain["prompt_tokens"] + 4 * 32 + len(texts)
    assert answer["new_tokens"] == 3
    assert answer["seconds_to_first_token"] > 0


def test_a_retriever_that_reranks_is_refused():
    with pytest.raises(InvalidArgumentError, match="SimpleNamespace reranks what a bank finds"):
        script("passages").Shelf([], SimpleNamespace(candidates=2), [])


def test_embeddings_of_a_corpus_that_has_changed_are_not_taken(corpora, tmp_path):
    passages, embedded = script("passages"), []

    def embed_chunks(found):
        embedded.extend(found)
        return torch.ones(len(found), 4)

    retriever = SimpleNamespace(dim=4, metric="cosine", embed_chunks=embed_chunks)
    first = passages._embedded(Corpus.load("one"), retriever, "of/ours", 0)
    assert len(first) == len(embedded) == len(Corpus.load("one").bank)
    assert len(passages._embedded(Corpus.load("one"), retriever, "of/ours", 0)) == len(first)
    assert len(embedded) == len(first)
    assert len(passages._embedded(Corpus.load("one"), retriever, "of/ours", 3)) == len(first)
    alone, reaching = embedded[: len(first)], embedded[len(first) :]
    assert [len(each.token_ids) for each in reaching[1:]] == [len(each.token_ids) + 3 for each in alone[1:]]
    for each, other in zip(reaching, alone, strict=True):
        assert each.token_ids[-len(other.token_ids) :] == other.token_ids
    (tmp_path / "one.txt").write_text(book(3, 12), encoding="utf-8")
    assert (
        CliRunner().invoke(make_app(), ["remember", "--out", "one", *corpora[4:], "one.txt"]).exit_code == 0
    )
    changed = Corpus.load("one")
    assert len(passages._embedded(changed, retriever, "of/ours", 0)) == len(changed.bank) < len(first)


def test_a_book_is_read_once_and_another_in_its_place_is_refused(tmp_path, monkeypatch, books, model):
    two_books, read = script("two_books"), []

    def remember(model, out, *paths):
        read.append(out)
        typed = [
            "remember",
            "--model",
            model,
            "--dtype",
            "float32",
            "--out",
            out,
            *paths,
            "--chunk-size",
            "32",
        ]
        assert CliRunner().invoke(make_app(), [*map(str, typed)]).exit_code == 0
        return two_books.Ran(2.0, 1.0, 5, None)

    monkeypatch.setattr(two_books, "remember", remember)
    monkeypatch.setattr(two_books, "_PART", 4000)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "999.txt").write_text("of a longer text", encoding="utf-8")
    took = two_books._read(tmp_path, "one", books["one"], model)
    assert (
        took
        == two_books._read(tmp_path, "one", books["one"], model)
        == {
            "seconds": 2.0,
            "cpu_seconds": 1.0,
            "peak_bytes": 5,
        }
    )
    assert len(read) == 1
    parts = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "one").iterdir()}
    assert len(parts) > 1
    assert "999.txt" not in parts
    with pytest.raises(two_books.InvalidArgumentError, match="was read from another text"):
        two_books._read(tmp_path, "one", books["one"][:9000], model)
    with pytest.raises(two_books.InvalidArgumentError, match=r"was read by .* and --model is 'demo'"):
        two_books._read(tmp_path, "one", books["one"], "demo")
    assert parts == {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "one").iterdir()}


def test_a_fresh_answer_is_compared_with_that_to_its_own_question():
    two_books = script("two_books")
    rest = {"seconds_to_first_token": 1.0, "seconds_per_token": 1.0, "new_tokens": 2}
    ran = [[two_books.Ran(3.0, 1.0, 5, {"answers": [{"answer": each, **rest}]})] for each in ("a", "b", "c")]
    assert two_books._fresh_row(ran, ["a", "c", "b"])["same_answers"] == 1


def test_a_difference_is_paired(bench):
    two_books = script("two_books")
    asked = [bench.Question("one", "name", "cue", answer, "") for answer in ("Ahab", "Starbuck", "Pequod")]
    said = {"memory": ["Ahab", "Starbuck", "no"], "other": ["Ahab", "no", "Pequod"]}
    found = two_books._differences(asked, said)["other"]
    assert (found["value"], found["only_memory"], found["only_other"]) == (0, 1, 1)
    assert found["low"] < 0 < found["high"]


def test_passages_have_the_answer_or_not(bench):
    two_books = script("two_books")
    asked = [bench.Question("one", "name", "and there was", "Ahab", "")] * 2
    answers = [{"passages": ["And there", "was Ahab."]}, {"passages": ["There was Ahab"]}]
    assert two_books._found(asked, answers)["count"] == 1
    assert two_books._found(asked, [{"passages": []}, {}]) is None


def test_the_last_paragraphs_of_a_book_can_be_chosen(tmp_path):
    two_books = script("two_books")
    path = tmp_path / "a.txt"
    path.write_text("one one\n\ntwo\n\nthree", encoding="utf-8")
    assert two_books._texts([f"a={path}"], ["a=9"]) == {"a": "two\n\nthree"}
    with pytest.raises(two_books.InvalidArgumentError, match="--latest must be NAME=N"):
        two_books._texts([f"a={path}"], ["b=9"])
    with pytest.raises(two_books.InvalidArgumentError, match="--book must be NAME="):
        two_books._texts([str(path)], [])


@pytest.mark.slow
def test_two_books_are_read_once_and_asked_at_once(tmp_path, monkeypatch, books, model):
    monkeypatch.chdir(tmp_path)
    typed = ["--model", model, "--questions", 3, "--fresh", 1, "--rounds", 1, "--max-new-tokens", 4]
    for number, name in enumerate(books):
        (tmp_path / f"{name}.txt").write_text(book(number, 12), encoding="utf-8")
        typed += ["--book", f"{name}={name}.txt"]
    for each in ("memory", "RAG as text", "no memory"):
        typed += ["--only", each]
    said, found = measured("two_books", tmp_path / "two_books.json", *typed)
    assert "| memory |" in said
    assert [*found["rows"]] == ["memory", "RAG as text", "no memory"]
    for row in found["rows"].values():
        assert row["right"]["all"]["trials"] == 6
        assert row["fresh"]["same_answers"] == 1
        assert row["fresh"]["whole_seconds"] > row["fresh"]["first_seconds"] > 0
    assert found["again"]["same_keys_and_values"]
    assert found["books"]["one"]["bytes"] > found["books"]["one"]["text_bytes"] > 0
    assert found["complete"]
