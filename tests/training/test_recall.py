"""Generated episodes: what is asked has left the window, was told before, and alone is trained on."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from memlong import MemoryDecoder
from memlong.decoder import Retrieval
from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.training import RandomChunks, Trainer, TrainingConfig
from memlong.training import trainer as trainer_module
from memlong.training.checks import check_settings
from memlong.training.config import RECALL
from memlong.training.documents import Episode, Mixture
from memlong.training.found import found_answers, places_of
from memlong.training.loss import Piece
from memlong.training.recall import RecallEpisodes, _number

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


def test_an_episode_in_which_nothing_can_be_asked_for_is_drawn_again(monkeypatch):
    made, starts = episodes(), []
    chosen = made._chosen

    def none_at_first(facts, start, random):
        starts.append(start)
        return [] if starts.count(start) == 1 else chosen(facts, start, random)

    monkeypatch.setattr(made, "_chosen", none_at_first)
    assert made[0].weights.any()
    assert starts.count(0) == 2
    monkeypatch.setattr(made, "_chosen", lambda *_: [])
    with pytest.raises(InvalidTextError, match="leave something to ask for"):
        made[0]


def test_a_variable_has_the_value_that_its_line_gives_it_be_that_another_variable():
    text = Letters().decode(episodes("variables")[0].tokens.tolist()).split("\n")
    values = dict(line[4:].split(" = ") for line in text if line.startswith("VAR "))
    asked = [line for line in text if re.fullmatch(r"The value of \w+ is (VAR )?\w+", line)]
    assert asked
    for line in asked[:-1]:
        name, value = line.removeprefix("The value of ").split(" is ")
        assert values[name] == value
    assert any(value.startswith("VAR ") for value in values.values())
    assert any(" is VAR " in line for line in asked)


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
        (
            {"kind": "dictionary", "tokens": 8192, "filler": [filler(60)]},
            InvalidTextError,
            "at least 64 diff",
        ),
        ({"kind": "repeat", "filler": [filler(90)]}, InvalidTextError, "at least 1024 tokens, an episode of"),
    ],
)
def test_what_no_episode_can_be_made_of_is_said(change, error, message):
    given = {"kind": "needles", "tokenizer": Letters(), "filler": [filler()], **change}
    with pytest.raises(error, match=message):
        RecallEpisodes(**{"tokens": 1024, **given}, segment_size=SEGMENT, local_window=WINDOW, seed=0)


@pytest.mark.parametrize("kind", RECALL)
def test_sizes_are_refused_at_once_or_work_for_all_episodes(kind):
    refused = 0
    for change in (
        *({"segment_size": size} for size in (32, 48, 56, 64, 72, 80, 96)),
        *({"tokens": tokens} for tokens in (600, 768, 800, 840, 880)),
    ):
        try:
            source = episodes(kind, **{"tokens": 1024, **change})
        except InvalidArgumentError as error:
            assert ("segment_size" if "segment_size" in change else "document_tokens") in str(error)  # noqa: PT017
            refused += 1
        else:
            assert all(source[number].weights.any() for number in range(20))
    assert 0 < refused < 12


def test_words_and_filler_are_plain_text():
    class Opened(Letters):
        all_special_ids = (LETTERS.index("~"),)

    marked = torch.tensor(Letters()("~" + words(300) + " antidisestablishmentarianism ~special").input_ids)
    source = RecallEpisodes(
        "needles", Opened(), [marked], tokens=2048, segment_size=SEGMENT, local_window=WINDOW, seed=0
    )
    assert set(source._words) == {*words(300).split(), "special"}  # no part of a longer word
    assert "~" not in Letters().decode(source[0].tokens.tolist())


@pytest.mark.parametrize("kind", ["passkey", "variables", "repeat"])
def test_kinds_without_names_need_no_words(kind):
    figures = torch.tensor(Letters()(" ".join(map(str, range(1000)))).input_ids)
    sizes = {"tokens": 2048, "segment_size": SEGMENT, "local_window": WINDOW, "seed": 0}
    assert RecallEpisodes(kind, Letters(), [figures], **sizes)[0].weights.any()


def test_a_word_has_one_entry():
    for number in range(3):
        source = RecallEpisodes(
            "dictionary",
            Letters(),
            [filler(70)],
            tokens=8192,
            segment_size=SEGMENT,
            local_window=WINDOW,
            seed=0,
        )
        entries = {}
        for line in Letters().decode(source[number].tokens.tolist()[:-SEGMENT]).split("\n"):
            if match := re.fullmatch(r"(\w+): ([\w ]+)", line):
                entries.setdefault(match[1], set()).add(match[2])
        assert len(entries) > 20
        assert all(len(values) == 1 for values in entries.values())


def test_what_is_repeated_does_not_stand_in_the_window():
    """Of a filler that comes again after 479 tokens, as a text may quote itself."""
    again = filler(60).repeat(9)
    source = RecallEpisodes(
        "repeat", Letters(), [again], tokens=4096, segment_size=SEGMENT, local_window=400, seed=0
    )
    text, found = source[0].tokens.tolist(), 0
    for start, query in source[0].queries.items():
        window = text[start - 400 : start]
        assert not any(window[place : place + 24] == query[:24] for place in range(400))
        found += 1
    assert found > 3


def test_text_that_repeats_itself_all_the_time_is_refused():
    same = torch.tensor(Letters()("abc " * 1000).input_ids)
    sizes = {"tokens": 2048, "segment_size": SEGMENT, "local_window": WINDOW, "seed": 0}
    with pytest.raises(InvalidTextError, match="repeat themselves within the local window"):
        RecallEpisodes("repeat", Letters(), [same], **sizes)[0]


@pytest.mark.parametrize("kind", ["dictionary", "needles", "variables"])
def test_questions_come_one_by_one_once_and_late_where_they_are_to(kind):
    source = episodes(kind, questions=1, again=False, asked_from=2000)
    for number in range(3):
        episode = source[number]
        text = Letters().decode(episode.tokens.tolist())
        asked = [Letters().decode(query) for _, query in sorted(episode.queries.items())]
        assert min(episode.queries) == 2048  # the first segment from there on
        assert len(asked) > 4
        assert len(set(asked)) == len(asked)
        assert all(query.count("\n") == 1 for query in asked)
        marked = {start - start % SEGMENT for start, _ in answers(episode)}
        assert marked <= set(episode.queries)
        assert len(answers(episode)) == len(marked)
        assert all(text.count(query) == 1 for query in asked if kind != "dictionary")  # its entry looks alike


def test_numbers_have_each_length_alike():
    random = np.random.default_rng(0)
    lengths = [len(_number(random)) for _ in range(1000)]
    assert set(lengths) == {3, 4, 5, 6}
    assert all(200 < lengths.count(length) < 300 for length in range(3, 7))


def test_an_answer_counts_as_much_as_ten_tokens_of_text():
    assert set(episodes()[0].weights.tolist()) == {0.0, 10.0}


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


def mixed_trainer(model, small, folder, documents=None, memory=None, **changes):
    sizes = {"segment_size": SEGMENT, "local_window": 300, "chunk_size": 32, "top_k": 2}
    memory = small(**{"kv_source": "shared", "retrieval_layers": "2-3", **sizes, **(memory or {})})
    settings = {
        "steps": 6,
        "rows": 2,
        "document_tokens": 1280,
        "accumulate": 2,
        "mix": {"needles": 1, "text": 1},
        "lora_rank": 2,
        "warmup_steps": 0,
        "checkpoint_every": 1,
    }
    config = TrainingConfig(**{**settings, **changes})
    return Trainer(MemoryDecoder(model, Letters(), memory), documents or [filler()], config, folder=folder)


def test_generated_episodes_need_no_long_document(tiny_model, small, tmp_path):
    run = mixed_trainer(tiny_model("Llama"), small, tmp_path, filler().split(200), mix={"needles": 1})
    assert len(run._source[0].tokens) == 1280
    with pytest.raises(InvalidTextError, match="At least one document must have 556 tokens"):
        mixed_trainer(tiny_model("Llama"), small, tmp_path, filler().split(200))


def test_filler_is_part_of_the_text_that_a_run_resumes_with(tiny_model, small, tmp_path):
    one, other = (
        mixed_trainer(tiny_model("Llama"), small, tmp_path, [filler(), short])._made_of()["text"]
        for short in (filler()[:50], filler()[50:100])
    )
    assert one != other


def test_a_stage_without_memory_reads_text_alone(tiny_model, small, tmp_path, monkeypatch):
    run = mixed_trainer(tiny_model("Llama"), small, tmp_path, mix={"needles": 1}, warmup_stage_steps=2)
    seen = []
    for name in ("episodes", "_source"):
        source = getattr(run, name)
        monkeypatch.setattr(run, name, Watched(source, name, seen))
    run.run()
    assert seen[:2] == ["episodes"] * 2
    assert set(seen[2:]) == {"_source"}


@pytest.mark.parametrize("most", [1, 2])
def test_a_segment_asks_as_many_questions_as_the_training_says(tiny_model, small, tmp_path, most):
    run = mixed_trainer(tiny_model("Llama"), small, tmp_path, mix={"variables": 1}, questions=most)
    queries = [query for number in range(4) for query in run._source[number].queries.values()]
    assert max(Letters().decode(query).count("The value of") for query in queries) == most


class Watched:
    """Notes that episodes are taken from a source."""

    def __init__(self, source, name, seen):
        self.source, self.name, self.seen = source, name, seen
        self.digest = getattr(source, "digest", None)

    def __getitem__(self, number):
        self.seen.append(self.name)
        return self.source[number]


@pytest.mark.parametrize(
    ("memory", "training", "message"),
    [
        ({}, {"document_tokens": 768, "mix": {"needles": 1.0}}, "document_tokens must be above 768"),
        ({"top_k": 1}, {"negatives": 1}, "top_k must be at least 2 with negatives,.* got 1"),
        (
            {"top_k": 2},
            {"negatives": 1, "null_chunk": True},
            "top_k must be at least 3 with negatives,.* got 2",
        ),
        ({"retrieve_for": "answers"}, {}, "retrieve_for must be 'all' for training on text"),
        (
            {"retrieve_for": "answers"},
            {"mix": {"needles": 1, "text": 1}},
            "retrieve_for must be 'all' for training on text, got 'answers'",
        ),
        (
            {},
            {"only_found": True, "mix": {"text": 1}},
            "only_found must be False without a mix that asks for facts",
        ),
        (
            {"adapter_for": "memory"},
            {"warmup_stage_steps": 2},
            "warmup_stage_steps must be 0 with adapter_for 'memory', .* got 2",
        ),
    ],
)
def test_settings_are_refused_before_a_model_is_loaded(small, memory, training, message):
    config = small(segment_size=SEGMENT, local_window=300, **memory)
    with pytest.raises(InvalidArgumentError, match=message):
        check_settings(config, TrainingConfig(**training))


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


def test_lora_learns_to_answer_and_leaves_all_else_to_the_plain_model(tiny_model, small, tmp_path):
    memory = {"adapter_for": "memory", "retrieve_for": "answers"}
    run = mixed_trainer(tiny_model("Llama"), small, tmp_path, mix={"needles": 1}, memory=memory, lr=1e-2)
    run.run()
    config = json.loads((tmp_path / "memlong.json").read_text())["memory"]
    assert (config["adapter_for"], config["retrieve_for"]) == ("memory", "answers")
    ids, asked = filler()[None, : 2 * SEGMENT], [Letters()("word").input_ids]
    plain = MemoryDecoder(tiny_model("Llama"), Letters(), replace(run.decoder.config, adapter_for="all"))
    with plain as decoder:
        expected = decoder.read(ids)
        untaught = decoder.preview(ids[:, :8], queries=asked).logits
    with MemoryDecoder.from_pretrained(tmp_path, tiny_model("Llama"), Letters()) as decoder:
        assert torch.equal(decoder.read(ids), expected)
        unasked, answer = (decoder.preview(ids[:, :8], queries=each).logits for each in (None, asked))
    for other in (unasked, untaught):
        assert not torch.allclose(answer, other, atol=1e-3)


def test_questions_are_learned_from_as_they_are_answered_and_not_remembered(tiny_model, small, tmp_path):
    """Weights hardly change, so each step's loss is that of the same model, asked after it has read without memory."""
    memory = {"retrieve_for": "answers", "kv_source": "layer"}
    steps = {"steps": 3, "accumulate": 1, "lr": 1e-12, "rows": 1, "mix": {"needles": 1}}
    run = mixed_trainer(tiny_model("Llama"), small, tmp_path, memory=memory, **steps)
    episode = run._source[0]
    losses = [step.loss for step in run.run()]
    expected, unasked = [], []
    with MemoryDecoder(tiny_model("Llama"), Letters(), run.decoder.config) as decoder:
        for start in range(0, len(episode.tokens), SEGMENT):
            ids, weights = (each[start : start + SEGMENT] for each in (episode.tokens, episode.weights))
            answer = weights.nonzero().flatten()
            if len(answer):
                asked = ids[None, : answer.max() + 1]
                for found, query in ((expected, episode.queries[start]), (unasked, None)):
                    logits = decoder.preview(asked, queries=[query]).logits[0]
                    found.append(cross_entropy(logits[answer - 1], ids[answer]).item())
            decoder.read(ids[None])
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses != pytest.approx(unasked, rel=1e-3)


def test_only_answers_that_were_found_are_learned_from(tiny_model, small, tmp_path, monkeypatch):
    """With random chunks, some facts are in them and some are not; those that are not have no weight."""
    kept, losses = [], []
    found_answers, segment_loss = trainer_module.found_answers, trainer_module.segment_loss

    def watched(segment, places, banks):
        found = found_answers(segment, places, banks)
        for row, retrieval in enumerate(segment.retrievals):
            spans = [] if retrieval is None else banks[row].spans_of(retrieval.ids.tolist()).tolist()
            for place in set(places[row].tolist()) - {-1}:
                held = any(start < place <= end for start, end in spans)
                assert found[row][places[row] == place].tolist() == [held] * int((places[row] == place).sum())
                kept.append(held)
        return found

    def weighed(segment, batch, config, *, found, **others):
        loss = segment_loss(segment, batch, config, found=found, **others)
        everything = segment_loss(segment, batch, config, found=None, **others)
        assert torch.equal(loss.sums, everything.sums)
        losses.append((loss.weight < everything.weight).item())
        return loss

    monkeypatch.setattr(trainer_module, "found_answers", watched)
    monkeypatch.setattr(trainer_module, "segment_loss", weighed)
    options = {"mix": {"needles": 1}, "random_share": 0.5, "steps": 6, "only_found": True}
    mixed_trainer(tiny_model("Llama"), small, tmp_path, memory={"retrieve_for": "answers"}, **options).run()
    assert {*kept} == {True, False}
    assert any(losses)


def test_an_answer_is_found_where_a_chunk_holds_the_end_of_its_fact():
    spans = {0: [0, 4], 1: [4, 8], 2: [8, 12]}
    bank = SimpleNamespace(spans_of=lambda ids: torch.tensor([spans[each] for each in ids]).reshape(-1, 2))
    retrievals = (Retrieval(torch.zeros(1), torch.tensor([1]), torch.zeros(1)), None)
    segment = SimpleNamespace(retrievals=retrievals)
    places = torch.tensor([[-1, 4, 5, 8, 9], [-1, 4, 5, 8, -1]])
    found = found_answers(segment, places, [bank, bank])
    assert found.tolist() == [[True, False, True, True, False], [True, False, False, False, True]]


def test_a_piece_ends_with_the_last_answer_of_each_row():
    ids, mask = torch.arange(15).reshape(3, 5), torch.tensor([[1] * 5, [1] * 5, [1, 1, 0, 0, 0]])
    counted = torch.tensor([[0, 1, 0, 1, 0], [0] * 5, [1, 0, 0, 0, 0]]).bool()
    piece = Piece(ids, mask, ((1,), None, (2,)), counted, 8).until_answered()
    assert piece.input_ids.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [10, 11, 12, 13]]
    assert piece.mask.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert (piece.queries, piece.start) == (((1,), None, (2,)), 8)
    assert piece.without_queries().queries == (None, None, None)
    nothing = Piece(ids, mask, (None,) * 3, torch.zeros_like(counted), 8).until_answered()
    assert nothing.input_ids.shape == (3, 0)


@pytest.mark.parametrize("kind", RECALL)
def test_each_answer_knows_where_its_fact_was_told(kind):
    episode = episodes(kind)[0]
    places = places_of(episode)
    assert torch.equal(places >= 0, episode.weights > 0)
    assert [places[start].item() for start, _ in answers(episode)] == [
        place for start in episode.told for place in episode.told[start]
    ][: len(answers(episode))]
    assert all(len({*places[start:end].tolist()}) == 1 for start, end in answers(episode))


@pytest.mark.parametrize("retrieve_for", ["all", "answers"])
def test_random_chunks_take_the_place_of_those_asked_for(
    tiny_model, small, tmp_path, monkeypatch, retrieve_for
):
    chosen = []
    choose = RandomChunks.choose

    def watched(self, search):
        found = choose(self, search)
        chosen.append(found is not None)
        return found

    monkeypatch.setattr(RandomChunks, "choose", watched)
    memory = {"retrieve_for": retrieve_for}
    options = {"mix": {"needles": 1}, "memory": memory, "random_share": 1.0, "steps": 2}
    mixed_trainer(tiny_model("Llama"), small, tmp_path, **options).run()
    assert chosen
    assert all(chosen)


@pytest.mark.parametrize(
    "mix",
    [
        {"poems": 1},
        {"needles": 0},
        {"needles": "much"},
        {"needles": -1, "text": 2},
        {"needles": True},
        {"needles": 1e308, "text": 1e308},
    ],
)
def test_a_mix_that_cannot_be_is_refused(mix):
    with pytest.raises(InvalidArgumentError, match=r"mix must give shares above 0 of .*'needles'.*, got"):
        TrainingConfig(mix=mix)


@pytest.mark.parametrize("mix", [None, "needles=1", [("needles", 1)]])
def test_a_mix_is_a_mapping(mix):
    with pytest.raises(InvalidArgumentError, match="mix must be a mapping from option to value, got a "):
        TrainingConfig(mix=mix)


def test_a_share_that_is_text_is_explained():
    with pytest.raises(
        InvalidArgumentError, match=r"got '1,text=1' of 'needles': give a number, and each kind by"
    ):
        TrainingConfig(mix={"needles": "1,text=1"})


def test_the_order_of_kinds_does_not_matter():
    one, other = (
        TrainingConfig(mix=mix) for mix in ({"text": 1, "needles": np.float64(2)}, {"needles": 2, "text": 1})
    )
    assert list(one.mix.items()) == list(other.mix.items()) == [("needles", 2.0), ("text", 1.0)]


@pytest.fixture
def bench(monkeypatch, tiny_model, small, tmp_path):
    """Runs bench/recall.py on a tiny model, and returns its rows."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    module = importlib.import_module("recall")
    sizes = {"segment_size": SEGMENT, "local_window": 300, "chunk_size": 32, "top_k": 2}
    decoder = MemoryDecoder(tiny_model("Llama"), Letters(), small(**sizes))
    monkeypatch.setattr(module, "load_model", lambda *_, **__: (None, None))
    monkeypatch.setattr(module, "MemoryDecoder", lambda *_: decoder)
    (tmp_path / "text.txt").write_text(words(900))

    def run(**changes):
        given = {"tokens": 1280, "kinds": "needles,variables", **changes}
        module.main(text=[tmp_path / "text.txt"], json_file=tmp_path / "r.json", **given)
        rows = json.loads((tmp_path / "r.json").read_text())["systems"]["memory, 1280"]["rows"]
        return [row for row in rows if row["kind"] == "needles"]

    yield run
    sys.modules.pop("recall", None)


def test_the_bench_compares_chunks_on_the_same_answers(bench):
    rows = bench(chunks="random,foreign,none", questions=4, again=True)
    assert [row["chunks"] for row in rows] == ["foreign", "none", "random", "retrieved"]
    assert len({row["answers"]["trials"] for row in rows}) == 1
    assert rows[0]["answers"]["trials"] > 3
    assert len({row["loss"] for row in rows}) == 4
    held = {row["chunks"]: row["held"] for row in rows}
    assert held["foreign"] is held["none"] is None
    assert held["retrieved"]["trials"] == held["random"]["trials"] == rows[0]["answers"]["trials"]
    assert held["retrieved"]["count"] > held["random"]["count"]


def test_the_bench_reads_the_chunks_retrieved_as_text(bench, llama, small, text):
    """After the sinks, in the text's order, before the question; the model itself says what is right."""
    module = sys.modules["recall"]
    ids = text(200)[0]
    episode = SimpleNamespace(tokens=ids)
    weights = torch.zeros(11)
    weights[[3, 4, 8]] = 1.0
    with MemoryDecoder(llama, None, small(chunk_size=8, sink_tokens=4)) as decoder, torch.no_grad():
        decoder.read(ids[None, :160])
        retrieval = Retrieval(torch.zeros(1), torch.tensor([5, 2]), torch.zeros(2))
        segment = SimpleNamespace(retrievals=[retrieval])
        reading = module.Reading(decoder, episode, "text", None, 0, 1)
        judged = [*reading.judged(segment, ids[160:172], weights)]
        assert not [*reading.judged(segment, ids[160:172], torch.zeros(11))]
    read = torch.cat([ids[:4], ids[20:28], ids[44:52], ids[160:172]])
    with torch.no_grad():
        logits = llama(read[None]).logits[0, -12:-1]
    losses = torch.nn.functional.cross_entropy(logits, ids[161:172], reduction="none")
    torch.testing.assert_close(torch.cat([each for _, each in judged]), losses[[3, 4, 8]])
    right = logits.argmax(-1) == ids[161:172]
    assert [each for each, _ in judged] == [bool(right[3:5].all()), bool(right[8])]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
def test_a_reader_of_chunks_as_text_is_trained_on_the_same_answers(bench, tiny_model, small):
    """What is to be predicted is an answer, and nearly always stands in what is read before it."""
    module = importlib.import_module("text_reader")
    model, tokenizer = tiny_model("Llama"), Letters()
    config = small(segment_size=SEGMENT, local_window=400, chunk_size=128, top_k=2)
    rag = module.RagAsText(model, tokenizer, config)
    given = module.examples(rag, [filler()], 2048, seed=0)
    drawn = [next(given) for _ in range(24)]
    found = 0
    for ids, targets in drawn:
        assert ids.shape == targets.shape
        places = (targets != -100).nonzero()[:, 0]
        assert torch.equal(targets[places[:-1]], ids[places[:-1] + 1])
        last = places[places >= places[-1] - 3]
        answer, before = (tokenizer.decode(each.tolist()) for each in (targets[last], ids[: places[0] + 1]))
        found += answer in before
    assert found > 12
    rag = module.RagAsText(model, tokenizer, replace(config, top_k=16))
    with pytest.raises(
        InvalidArgumentError, match="--tokens must leave 16 chunks before a question, got 1280"
    ):
        next(module.examples(rag, [filler()], 1280, seed=0))
    few = itertools.cycle(drawn[:2])
    with torch.no_grad():
        losses = [cross_entropy(model(ids[None]).logits[0], targets) for ids, targets in drawn[:2]]
    reader = module.trained(model, few, steps=20, rows=2, lr=1e-2, rank=4)
    with torch.no_grad():
        after = [cross_entropy(reader(ids[None]).logits[0], targets) for ids, targets in drawn[:2]]
    assert sum(after) < 0.8 * sum(losses)


def test_the_bench_asks_where_a_segment_begins(bench):
    with pytest.raises(
        InvalidArgumentError, match="--tokens must be a multiple of 256, the size of segments, got 1300"
    ):
        bench(tokens=1300)


def test_episodes_say_where_what_they_ask_for_was_told():
    episode = episodes("variables", again=False)[0]
    text = Letters().decode(episode.tokens.tolist())
    for start, query in episode.queries.items():
        names = re.findall(r"value of (\w+)", Letters().decode(query))
        lines = [text[:end].strip().rpartition("\n")[2] for end in episode.told[start]]
        assert all(line.startswith(f"VAR {name} = ") for name, line in zip(names, lines, strict=True))
    assert episode.told


def test_a_chunk_holds_a_fact_if_it_holds_its_end(bench, llama, small, text):
    holds = sys.modules["recall"]._holds
    with MemoryDecoder(llama, None, small(chunk_size=8)) as decoder:
        decoder.read(text(96))
        (bank,) = decoder.banks
        (start, end) = bank.spans_of([2])[0].tolist()
        found = Retrieval(torch.zeros(1), torch.tensor([1, 2]), torch.zeros(2))
        assert [holds(bank, found, place) for place in (start + 1, end, end + 1)] == [True, True, False]
        assert not holds(bank, replace(found, ids=torch.tensor([2])), start)
        assert not holds(bank, None, end)


def test_the_bench_has_full_attention_answer_the_same(bench):
    (row,) = bench(full=True)
    assert row["chunks"] == "full attention"
    assert row["answers"]["trials"] == bench(chunks="")[0]["answers"]["trials"]


def test_the_bench_names_unknown_chunks(bench):
    with pytest.raises(InvalidArgumentError, match="some of random, foreign, none, text, got 'best'"):
        bench(chunks="best")


class Reader:
    """A decoder that answers questions as it is told to, and notes what it is asked."""

    tokenizer = Letters()

    def __init__(self, wrong=""):
        self.wrong, self.asked = wrong, []

    def preview(self, new, *, queries, choice):
        self.asked.append((self.tokenizer.decode(queries[0]).strip(), choice))
        likely = new.roll(-1, dims=1)
        if self.wrong and self.wrong in self.asked[-1][0]:
            likely = likely * 0
        return SimpleNamespace(logits=torch.nn.functional.one_hot(likely, len(LETTERS)).float())


@pytest.mark.parametrize(
    ("text", "wrong", "first", "found", "asked"),
    [
        ("", "", True, [True], ["FGHI", "BCDE"]),
        ("", "FGHI", True, [False], ["FGHI", "BCDE"]),
        ("", "BCDE", True, [False], ["FGHI", "BCDE"]),
        ("", "", False, [False], ["FGHI", "BCDE"]),
        ("\nThe value of BCDE is 17\n", "", True, [], []),
    ],
)
def test_the_bench_follows_a_variable_to_its_number(bench, text, wrong, first, found, asked):
    module = sys.modules["recall"]
    told = f"\nVAR BCDE = 17\n\nVAR FGHI = VAR BCDE\n\nVAR JKLM = VAR FGHI\n{text}"
    ids = Letters()(told).input_ids
    question = Letters()("\nThe value of JKLM is").input_ids
    episode = SimpleNamespace(tokens=torch.tensor([*ids, *question]), queries={len(ids): question})
    reader = Reader(wrong)
    judged = [(first, torch.ones(2))]
    followed = [*module.Reading(reader, episode, "random", "random", 1, 3).followed(len(ids), judged)]
    assert [right for right, _ in followed] == found
    assert reader.asked == [(f"The value of {name} is", "random") for name in asked]
    assert [len(losses) for _, losses in followed] == [2 + len(" VAR BCDE") + len(" 17")] * len(found)


def test_the_bench_follows_no_variable_that_has_a_number(bench):
    module = sys.modules["recall"]
    ids = Letters()("\nVAR BCDE = 17\n").input_ids
    question = Letters()("\nThe value of BCDE is").input_ids
    episode = SimpleNamespace(tokens=torch.tensor([*ids, *question]), queries={len(ids): question})
    reader = Reader()
    reading = module.Reading(reader, episode, "retrieved", None, 0, 1)
    assert not [*reading.followed(len(ids), [(True, torch.ones(2))])]
    assert not reader.asked
