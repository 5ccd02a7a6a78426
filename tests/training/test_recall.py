"""Generated episodes: what is asked has left the window, was told before, and alone is trained on."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from memlong import MemoryDecoder
from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.training import Trainer, TrainingConfig
from memlong.training.config import RECALL
from memlong.training.documents import Episode, Mixture
from memlong.training.recall import RecallEpisodes

SEGMENT, WINDOW = 256, 512
LETTERS = "\n" + "".join(map(chr, range(32, 127)))


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text, **options):
        return SimpleNamespace(input_ids=[LETTERS.index(letter) for letter in text])

    def decode(self, ids):
        return "".join(LETTERS[each] for each in ids)

    def build_inputs_with_special_tokens(self, ids):
        return ids


def words(count):
    """Different words without a digit."""
    return " ".join(
        f"word{'abcdefghij'[n // 100]}{'abcdefghij'[n // 10 % 10]}{'abcdefghij'[n % 10]}"
        for n in range(count)
    )


def filler(count=900):
    return torch.tensor(Letters()(words(count)).input_ids)


def episodes(kind="needles", tokens=4096, seed=0, **changes):
    sizes = {"tokens": tokens, "segment_size": SEGMENT, "local_window": WINDOW, **changes}
    return RecallEpisodes(kind, Letters(), [filler()], seed=seed, **sizes)


def answers(episode):
    """Return where each answer starts and ends."""
    marks = torch.cat([torch.zeros(1), episode.weights, torch.zeros(1)]).diff()
    return list(zip((marks > 0).nonzero()[:, 0].tolist(), (marks < 0).nonzero()[:, 0].tolist(), strict=True))


@pytest.mark.parametrize("kind", RECALL)
def test_what_is_asked_has_left_the_window_and_was_told_before(kind):
    found = 0
    for number in range(4):
        episode = episodes(kind)[number]
        text = Letters().decode(episode.tokens.tolist())
        assert len(text) == len(episode.weights) == 4096
        for start, end in answers(episode):
            if end == 4096:  # cut off
                continue
            found += 1
            answer = text[start:end].strip()
            segment = start - start % SEGMENT
            query = Letters().decode(episode.queries[segment])
            assert text[segment : segment + 4] == query[:4]
            assert text[start - 4 : start] in query
            assert answer in text[: segment - WINDOW], (kind, answer)
            if kind in ("needles", "passkey"):  # words and variables come again
                assert answer not in text[segment - WINDOW : segment], (kind, answer)
            if kind != "repeat":  # whose question is text, too
                assert answer not in query
    assert found > 10


def test_an_episode_follows_from_seed_and_number():
    same, other = episodes()[3], episodes(seed=1)[3]
    assert torch.equal(episodes()[3].tokens, same.tokens)
    assert not torch.equal(episodes()[4].tokens, same.tokens)
    assert not torch.equal(other.tokens, same.tokens)


def test_a_chain_of_variables_is_asked_for_its_number():
    text = Letters().decode(episodes("variables")[0].tokens.tolist())
    values = {}
    for line in text.split("\n"):
        if line.startswith("VAR "):
            name, value = line[4:].split(" = ")
            values[name] = values.get(value.removeprefix("VAR "), value)
    asked = [
        line.split()
        for line in text.split("\n")
        if line.startswith("The value of ") and len(line.split()) == 6
    ]
    assert asked
    assert all(values[name] == value for _, _, _, name, _, value in asked[:-1])
    assert any(line.count("VAR") == 2 for line in text.split("\n"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"kind": "poems"},
            InvalidArgumentError,
            r"kind must be one of 'dictionary', 'needles', .* got 'poems'",
        ),
        ({"tokenizer": None}, InvalidArgumentError, "give the decoder a tokenizer"),
        ({"filler": []}, InvalidTextError, "at least 256 tokens, a segment, got 0"),
        ({"filler": [filler(40)]}, InvalidTextError, r"at least 50 different words .* got 40"),
    ],
)
def test_what_no_episode_can_be_made_of_is_said(change, error, message):
    given = {"kind": "needles", "tokenizer": Letters(), "filler": [filler()], **change}
    with pytest.raises(error, match=message):
        RecallEpisodes(**given, tokens=1024, segment_size=SEGMENT, local_window=WINDOW, seed=0)


def test_a_segment_too_short_for_a_question_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"segment_size must be at least .* of 'needles', got 64"):
        episodes(segment_size=64)[0]


@pytest.mark.parametrize("sizes", [{"tokens": 600}, {"segment_size": 32, "local_window": 64}])
def test_an_episode_that_asks_nothing_is_refused(sizes):
    with pytest.raises(InvalidArgumentError, match="must leave room for facts of 'passkey'"):
        episodes("passkey", **sizes)[0]


def test_a_mixture_keeps_its_shares():
    class Constant:
        def __init__(self, value):
            self.value = value

        def __getitem__(self, number):
            return Episode(torch.tensor([self.value, number]))

    mixed = Mixture({"a": Constant(1), "b": Constant(2)}, {"a": 1, "b": 3}, seed=0)
    drawn = [mixed[number].tokens.tolist() for number in range(400)]
    assert drawn == [mixed[number].tokens.tolist() for number in range(400)]
    assert [number for _, number in drawn] == list(range(400))
    assert 70 < sum(kind == 1 for kind, _ in drawn) < 130


def mixed_trainer(model, small, folder):
    sizes = {"segment_size": SEGMENT, "local_window": 300, "chunk_size": 32, "top_k": 2}
    memory = small(kv_source="shared", retrieval_layers="2-3", **sizes)
    config = TrainingConfig(
        steps=6,
        rows=2,
        document_tokens=1280,
        accumulate=2,
        mix={"needles": 1, "text": 1},
        lora_rank=2,
        warmup_steps=0,
        checkpoint_every=1,
    )
    return Trainer(MemoryDecoder(model, Letters(), memory), [filler()], config, folder=folder)


def test_a_mix_is_trained_on_and_resumes_to_the_same_losses(tiny_model, small, tmp_path):
    whole = mixed_trainer(tiny_model("Llama"), small, tmp_path / "whole").run()
    assert len(whole) == 6
    assert all(step.loss > 0 for step in whole)

    def stop(step):
        if step.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mixed_trainer(tiny_model("Llama"), small, tmp_path / "cut").run(progress=stop)
    assert list((tmp_path / "cut").glob("checkpoint-*"))
    resumed = mixed_trainer(tiny_model("Llama"), small, tmp_path / "cut").run(resume=True)
    assert [step.loss for step in resumed] == pytest.approx([step.loss for step in whole], abs=1e-6)


@pytest.mark.parametrize(
    "mix", [{"poems": 1}, {"needles": 0}, {"needles": "much"}, {"needles": -1, "text": 2}]
)
def test_a_mix_that_cannot_be_is_refused(mix):
    with pytest.raises(InvalidArgumentError, match=r"mix must give shares above 0 of .*'needles'.*, got"):
        TrainingConfig(mix=mix)


@pytest.fixture
def bench(monkeypatch, tiny_model, small, tmp_path):
    """Runs bench/recall.py on a tiny model, and returns its rows."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    module = importlib.import_module("recall")
    sizes = {"segment_size": SEGMENT, "local_window": 300, "chunk_size": 32, "top_k": 2}
    decoder = MemoryDecoder(tiny_model("Llama"), Letters(), small(**sizes))
    monkeypatch.setattr(module, "_decoder", lambda *_: decoder)
    (tmp_path / "text.txt").write_text(words(900))

    def run(**changes):
        module.main(
            text=[tmp_path / "text.txt"],
            tokens=1280,
            kinds="needles",
            json_file=tmp_path / "r.json",
            **changes,
        )
        return json.loads((tmp_path / "r.json").read_text())["systems"]["memory, 1280"]["rows"]

    yield run
    sys.modules.pop("recall", None)


def test_the_bench_compares_chunks_on_the_same_answers(bench):
    rows = bench(chunks="retrieved,random,foreign,none")
    assert [row["chunks"] for row in rows] == ["retrieved", "random", "foreign", "none"]
    assert len({row["answers"]["trials"] for row in rows}) == 1
    assert rows[0]["answers"]["trials"] > 3
    assert len({row["loss"] for row in rows}) == 4


def test_the_bench_has_full_attention_answer_the_same(bench):
    (row,) = bench(chunks="retrieved", full=True)
    assert row["chunks"] == "full attention"
    assert row["answers"]["trials"] == bench(chunks="none")[0]["answers"]["trials"]


def test_the_bench_names_unknown_chunks(bench):
    with pytest.raises(InvalidArgumentError, match="some of retrieved, random, foreign, none, got 'best'"):
        bench(chunks="best")
