"""``memlong ask`` on a tiny random model: prompts to corpora, each alone."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from typer.testing import CliRunner

from memlong.cli.app import make_app
from memlong.corpus import Corpus
from memlong.errors import InvalidArgumentError, SnapshotError

DAY = 86_400


def text_of(first, count=40):
    return " ".join(f"word{(first + number * number) % 89}" for number in range(count))


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """What `memories` has read, empty at first."""
    return tmp_path_factory.mktemp("read")


@pytest.fixture
def memories(tmp_path, monkeypatch, arguments, read):
    """Two corpora: the old and the new document with tags, and one more. They are read once, and copied."""
    monkeypatch.chdir(tmp_path)
    if any(read.iterdir()):
        return shutil.copytree(read, tmp_path, dirs_exist_ok=True)
    for number, name in enumerate(("old", "new", "other")):
        path = tmp_path / f"{name}.txt"
        path.write_text(text_of(number * 7), encoding="utf-8")
        os.utime(path, (1000 * DAY * number + DAY, 1000 * DAY * number + DAY))
        words = arguments("remember", out="memory" if number < 2 else "more", tag=["all", name])
        result = CliRunner().invoke(make_app(), [*words, path.name])
        assert result.exit_code == 0, result.output + repr(result.exception)
    shutil.copytree(tmp_path, read, dirs_exist_ok=True, ignore=shutil.ignore_patterns("model"))
    return tmp_path


@pytest.fixture
def ask(memories, invoke):
    return lambda **changes: invoke(
        "ask", **{"memory": "memory", "prompt": "word1 word2", "max_new_tokens": 5, **changes}
    )


def told(result):
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(result.stdout)


def sources(found):
    return {each["source"] for answer in found["answers"] for each in answer["sources"]}


def test_the_answer_is_printed_and_told(ask):
    found = told(ask(json="-"))
    assert found["memory"] == ["memory"]
    (answer,) = found["answers"]
    assert answer["prompt"] == "word1 word2"
    assert answer["answer"].split() == ask().stdout.split()
    assert 1 <= answer["new_tokens"] <= 5
    assert answer["seconds_to_first_token"] > 0
    assert answer["new_tokens"] == 1 or answer["seconds_per_token"] > 0


def test_sources_are_told(ask, memories):
    found = told(ask(json="-"))
    (answer,) = found["answers"]
    shares = [each["attention"] for each in answer["sources"]]
    assert 1 >= sum(shares) > 0
    assert shares == sorted(shares, reverse=True)
    for each in answer["sources"]:
        assert each["title"] == each["source"]
        words = (memories / each["source"]).read_text(encoding="utf-8").split()
        assert each["text"].split() == words[each["first_token"] : each["end_token"]]
    shown = ask(sources=True).stdout
    best = answer["sources"][0]
    assert f"{best['source']}, tokens {best['first_token']} to {best['end_token']}: {best['text']}" in shown


def test_each_prompt_is_answered_alone(ask, memories):
    asked = ["word1 word2", "word3", "word1 word2"]
    (memories / "asked.txt").write_text("\n".join(asked) + "\n\n", encoding="utf-8")
    found = told(ask(prompt=[], prompts="asked.txt", json="-"))["answers"]
    assert [each["prompt"] for each in found] == asked
    assert found[0]["answer"] == found[2]["answer"]
    assert found[0]["sources"] == found[2]["sources"]
    assert told(ask(prompt="word3", json="-"))["answers"][0]["answer"] == found[1]["answer"]
    shown = ask(prompt=asked).stdout
    assert [line for line in shown.splitlines() if line.startswith("> ")] == [f"> {each}" for each in asked]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tag": "old"}, {"old.txt"}),
        ({"tag": ["new", "all"]}, {"new.txt"}),
        ({"since": "1971-01-01"}, {"new.txt"}),
        ({"until": "1971-01-01"}, {"old.txt"}),
        ({"document": ["new.txt"]}, {"new.txt"}),
        ({"memory": ["memory", "more"], "document": "other.txt"}, {"other.txt"}),
        ({"memory": ["memory", "more"], "tag": "all", "top_k": 100}, {"old.txt", "new.txt", "other.txt"}),
    ],
)
def test_filters(ask, changes, expected):
    assert sources(told(ask(**changes, json="-"))) == expected


def test_what_has_expired_is_not_found(ask, memories, arguments, monkeypatch):
    words = arguments("remember", out="memory", expires="2999-01-01")
    assert CliRunner().invoke(make_app(), [*words, "new.txt"]).exit_code == 0
    assert sources(told(ask(top_k=100, json="-"))) == {"old.txt", "new.txt"}
    monkeypatch.setattr("time.time", lambda: 40e9)
    assert sources(told(ask(top_k=100, json="-"))) == {"old.txt"}


def test_model_and_settings_come_from_the_corpus(memories, ask, model_folder, monkeypatch):
    """Only a name that is no place on this machine is taken from it."""
    from memlong.cli import choice

    sizes = ["--local-window", "24", "--segment-size", "8", "--max-new-tokens", "2"]
    words = ["ask", "--memory", "memory", "--prompt", "word1", *sizes, "--json", "-"]
    result = CliRunner().invoke(make_app(), words)
    assert "a place on this machine, which no file may choose" in str(result.exception)
    corpus = Corpus.load("memory")
    corpus.notes["model"] = "someone/model"
    corpus.save()
    loaded = []

    def load(name, **options):
        loaded.append((name, options))
        return before(str(model_folder), **options)

    before = choice.load
    monkeypatch.setattr(choice, "load", load)
    found = told(CliRunner().invoke(make_app(), words))
    assert (found["model"], found["chunk_size"], found["dtype"]) == ("someone/model", 4, "float32")
    ((name, options),) = loaded
    assert (name, options["trust_remote_code"]) == ("someone/model", False)


def test_the_corpora_are_not_changed(ask, memories):
    def state():
        return {path.name: path.read_bytes() for path in (memories / "memory").iterdir()}

    before = state()
    told(ask(json="-"))
    assert state() == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"memory": "none"}, SnapshotError, "memlong remember --out none"),
        ({"prompt": []}, InvalidArgumentError, "Give prompts either with --prompt"),
        ({"prompts": "old.txt"}, InvalidArgumentError, "Give prompts either with --prompt"),
        ({"prompt": ""}, InvalidArgumentError, "--prompt must not be empty"),
        ({"tag": "none"}, InvalidArgumentError, "No document passes --tag, --since, --until and --document"),
        ({"since": "soon"}, InvalidArgumentError, "--since must be an ISO date or time"),
        ({"chat": True}, InvalidArgumentError, "--chat needs a model with a chat template"),
        (
            {"chunk_size": 8},
            InvalidArgumentError,
            "--chunk-size must be 4, with which 'memory' was read, got 8: leave it out, or use another --memory",
        ),
        ({"memory": ["memory", "memory"]}, InvalidArgumentError, "--memory names 'memory' twice"),
    ],
)
def test_bad_input_is_named_with_what_to_do(ask, changes, error, message):
    result = ask(**changes)
    assert isinstance(result.exception, error), result.output
    assert message in str(result.exception)
