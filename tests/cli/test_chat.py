"""``memlong chat`` on a tiny random model: turns are remembered, and a session continues."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from memlong import MemoryDecoder, load_model
from memlong.cli.app import make_app
from memlong.corpus import Corpus
from memlong.errors import InvalidArgumentError, SnapshotError
from memlong.evaluation import chat_turn, end_of_turn

TEMPLATE = (
    "{% for turn in messages %}<s> {{ 'word80' if turn.role == 'user' else 'word81' }} {{ turn.content }} </s> "
    "{% endfor %}"
    "{% if add_generation_prompt %}<s> word81 {% endif %}"
)


@pytest.fixture
def memory(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        words = " ".join(f"word{(number * each * each) % 80}" for each in range(40))
        (tmp_path / f"{number}.txt").write_text(words, encoding="utf-8")
    result = CliRunner().invoke(make_app(), [*arguments("remember", out="memory"), "1.txt"])
    assert result.exit_code == 0, result.output
    return "memory"


@pytest.fixture
def chat(arguments, tmp_path, monkeypatch):
    """Say some lines, and return what is printed."""
    monkeypatch.chdir(tmp_path)

    def talk(*lines, **changes):
        words = arguments("chat", **{"max_new_tokens": 6, **changes})
        result = CliRunner().invoke(make_app(), words, input="".join(f"{line}\n" for line in lines))
        assert result.exit_code == 0, result.output + repr(result.exception)
        return result

    return talk


@pytest.fixture
def template(model_folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model_folder)
    return tokenizer


def test_each_line_is_answered(chat):
    assert len(chat("word1 word2", "", "word3").stdout.splitlines()) == 2


def test_it_ends_where_the_user_says(chat):
    assert chat("word1", "/exit", "word3").stdout == chat("word1").stdout
    assert chat().stdout == ""


def test_nobody_is_asked_where_nobody_sits(chat):
    assert ">" not in chat("word1").stdout


@pytest.mark.parametrize("has_memory", [False, True])
def test_a_session_continues_as_if_it_had_not_ended(chat, memory, has_memory):
    over = {"memory": memory} if has_memory else {}
    lines = ["word1 word2 word3", "word4 word5", "word6"]
    whole = chat(*lines, **over).stdout
    parts = [chat(line, session="talk", **over) for line in lines]
    assert "".join(each.stdout for each in parts) == whole
    assert not any("other documents" in each.stderr for each in parts)


def test_the_corpus_is_in_memory(chat, memory, monkeypatch):
    found = []
    search = MemoryDecoder.generate

    def generate(decoder, *inputs, **given):
        found.append(len(decoder.banks[0]))
        return search(decoder, *inputs, **given)

    monkeypatch.setattr(MemoryDecoder, "generate", generate)
    chat("word1", memory=memory)
    assert found == [len(Corpus.load(memory).bank)]


def test_a_session_goes_on_over_a_corpus_that_has_changed(chat, memory, arguments, monkeypatch):
    found = []
    generate = MemoryDecoder.generate

    def counted(decoder, *inputs, **given):
        found.append(len(decoder.banks[0].bases[0]))
        return generate(decoder, *inputs, **given)

    monkeypatch.setattr(MemoryDecoder, "generate", counted)
    chat("word1 word2", memory=memory, session="talk")
    words = [*arguments("remember", out=memory), "2.txt"]
    assert CliRunner().invoke(make_app(), words).exit_code == 0
    result = chat("word3", memory=memory, session="talk")
    assert "other documents" not in result.stderr
    assert found == [10, 20]


def test_a_session_goes_on_over_another_corpus(chat, memory, arguments):
    chat("word1 word2", memory=memory, session="talk")
    words = [*arguments("remember", out="other"), "2.txt"]
    assert CliRunner().invoke(make_app(), words).exit_code == 0
    memory = "other"
    result = chat("word3", memory=memory, session="talk")
    assert "talk: the conversation continues, over other documents" in result.stderr
    assert "other documents" not in chat("word3", memory=memory, session="talk").stderr


def test_what_has_expired_is_not_found(chat, memory, arguments, monkeypatch):
    from memlong.bank import LayeredBank

    words = [*arguments("remember", out=memory, expires="2999-01-01"), "2.txt"]
    assert CliRunner().invoke(make_app(), words).exit_code == 0
    found = []
    search = LayeredBank.search

    def searched(bank, *given, **options):
        result = search(bank, *given, **options)
        ids = result.ids[bank.layer_of(result.ids.flatten()).reshape(result.ids.shape) == 0]
        found.extend(bank.own_ids(ids).tolist())
        return result

    monkeypatch.setattr(LayeredBank, "search", searched)
    monkeypatch.setattr("time.time", lambda: 40e9)
    late = Corpus.load(memory)["2.txt"]
    for _ in range(2):
        chat("word1 word2", memory=memory, session="talk", top_k=100)
        assert found
        assert not any(late.holds(each) for each in found)
        found.clear()


def test_turns_are_those_of_the_template(chat, template, model_folder, monkeypatch):
    """As if the template had formatted the whole conversation at once."""
    read = []
    generate = MemoryDecoder.generate

    def heard(decoder, input_ids, *inputs, **given):
        result = generate(decoder, input_ids, *inputs, **given)
        read.append((input_ids, result))
        return result

    monkeypatch.setattr(MemoryDecoder, "generate", heard)
    lines = ["word1 word2", "word3"]
    chat(*lines)
    (first, answer), (second, _) = read
    _, tokenizer = load_model(model_folder)
    history = [
        {"role": "user", "content": lines[0]},
        {"role": "assistant", "content": tokenizer.decode(answer[0, first.shape[1] :])},
    ]
    assert torch.equal(first, chat_turn(tokenizer, lines[0]))
    assert torch.equal(second, chat_turn(tokenizer, lines[1], begins=False, history=history))


def test_an_answer_that_is_cut_off_gets_its_end(chat, template, monkeypatch):
    read, found = MemoryDecoder.read, []

    def reading(decoder, ids, *given):
        found.append(ids.tolist())
        return read(decoder, ids, *given)

    monkeypatch.setattr(MemoryDecoder, "read", reading)
    chat("word1", "word2", max_new_tokens=1)
    assert found == [[end_of_turn(template)]] * 2


def test_bytes_that_are_no_text_do_not_end_it(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("memlong.cli.chat._messages", lambda: iter(["word1 \udcff", "word2"]))
    result = CliRunner().invoke(make_app(), arguments("chat", max_new_tokens=3))
    assert result.exit_code == 0
    assert "must be UTF-8" in result.stderr
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"session": "memory"}, "--session and --memory must be different folders"),
        ({"backend": "none"}, "--backend must name a backend"),
    ],
)
def test_bad_input_is_named_with_what_to_do(arguments, memory, changes, message):
    result = CliRunner().invoke(make_app(), arguments("chat", memory=memory, **changes))
    assert isinstance(result.exception, InvalidArgumentError)
    assert message in str(result.exception)


def test_a_session_that_cannot_be_saved_is_refused_before_the_model_is_loaded(arguments, memory, monkeypatch):
    monkeypatch.setattr("memlong.cli.choice.load", lambda *_, **__: pytest.fail("the model was loaded"))
    Path("mine").mkdir()
    Path("mine", "letter.txt").write_text("dear", encoding="utf-8")
    for session, message in (
        ("mine", "letter.txt' is not part of a snapshot"),
        (memory, "snapshot of a corpus"),
    ):
        result = CliRunner().invoke(make_app(), arguments("chat", session=session), input="word1\n")
        assert isinstance(result.exception, SnapshotError)
        assert message in str(result.exception)


def test_without_a_corpus_a_model_is_needed():
    result = CliRunner().invoke(make_app(), ["chat"])
    assert "--model is missing" in str(result.exception)
