"""Chunks of other rows: who gets which, how many, and that a preview changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memlong import MemoryDecoder
from memlong.decoder import Retrieval
from memlong.decoder.retrievers.base import Passage
from memlong.decoder.stream.retrieval import Reranking, Search
from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.training import RandomChunks, Trainer, TrainingConfig
from memlong.training.chunks import ForeignChunks, Negatives
from memlong.training.loss import segment_loss


@pytest.fixture
def three_rows(llama, small, text):
    """A decoder that has read three texts, side by side."""
    with MemoryDecoder(llama, None, small(top_k=4)) as decoder:
        decoder.read(text(96, rows=3))
        yield decoder


def keys_of(bank):
    return [keys.flatten().tolist() for keys in bank.fetch(bank.ids).keys]


def owners(decoder, memory):
    """Of each chunk of a memory, the row whose bank holds it."""
    held = [keys_of(bank) for bank in decoder.banks]
    return [
        next(row for row, theirs in enumerate(held) if keys.flatten().tolist() in theirs)
        for keys in memory.keys
    ]


def never():
    return RandomChunks(0.0, torch.Generator().manual_seed(0))


def search(decoder, others=2, **changes):
    """What row 0 looks for."""
    found = Search(decoder.banks[0], query(decoder, 0), decoder.config, decoder.banks[1 : 1 + others])
    return replace(found, **changes)


class Ranked:
    """Chooses the chunk of a rank."""

    def __init__(self, rank):
        self.rank = rank

    def choose(self, search):
        found = search.bank.search(search.query[None], self.rank + 1)
        chunks = search.bank.fetch(found.ids[0, -1:])
        return Retrieval(search.query, chunks.ids, found.scores[0, -1:]), chunks


def query(decoder, row):
    return decoder.banks[row].embeddings_of(decoder.banks[row].ids[:1])[0]


def test_foreign_chunks_are_the_best_of_other_rows(three_rows):
    banks = three_rows.banks
    _, memory = ForeignChunks().choose(search(three_rows))
    assert len(memory.keys) == 4
    assert set(owners(three_rows, memory)) <= {1, 2}
    wanted = sorted(
        (
            score
            for bank in banks[1:]
            for score in bank.search(query(three_rows, 0)[None], len(bank)).scores[0].tolist()
        ),
        reverse=True,
    )[:4]
    scored = [
        float(bank.embeddings_of([each]) @ query(three_rows, 0))
        for bank in banks[1:]
        for each, keys in zip(bank.ids.tolist(), keys_of(bank), strict=True)
        if keys in memory.keys.flatten(1).tolist()
    ]
    assert sorted(scored, reverse=True) == pytest.approx(wanted)


def test_negatives_take_up_to_half_of_the_places_and_leave_the_best(three_rows):
    banks, asked = three_rows.banks, query(three_rows, 0)
    counts = set()
    for seed in range(20):
        negatives = Negatives(never(), 1, torch.Generator().manual_seed(seed))
        retrieval, memory = negatives.choose(search(three_rows))
        rows = owners(three_rows, memory)
        assert len(rows) == 4
        assert set(rows) <= {0, 1}  # one other row
        counts.add(rows.count(1))
        best = banks[0].search(asked[None], 4).ids[0, : rows.count(0)]
        assert torch.equal(retrieval.ids, best)
        own = [span for row, span in zip(rows, memory.spans[:, 0].tolist(), strict=True) if row == 0]
        assert own == sorted(own)
        assert memory.ids.tolist().count(-1) == rows.count(1)
    assert counts == {0, 1, 2}


def test_without_other_rows_chunks_are_retrieved_as_usual(three_rows):
    negatives = Negatives(never(), 3, torch.Generator())
    assert negatives.choose(search(three_rows, others=0)) is None


def test_a_stream_goes_on_after_foreign_chunks(three_rows, text):
    """What it holds of another row must not be taken for its own chunk of the same id."""
    negatives = Negatives(never(), 2, torch.Generator().manual_seed(0))
    for stream in three_rows._streams.batch.streams:
        stream.choice = negatives
    three_rows.read(text(16, seed=1, rows=3))
    for stream in three_rows._streams.batch.streams:
        stream.choice = None
    three_rows.read(text(16, seed=2, rows=3))
    for row, stream in enumerate(three_rows._streams.batch.streams):
        assert set(owners(three_rows, three_rows.banks[row].fetch(stream.memory.ids))) == {row}
        held = torch.stack([block.keys for block in stream.memory.blocks])
        assert torch.equal(held, three_rows.banks[row].fetch(stream.memory.ids).keys)


def test_a_preview_reads_what_stream_would_and_changes_nothing(three_rows, text):
    more = text(8, seed=1, rows=3)
    sizes = [len(bank) for bank in three_rows.banks]
    first = three_rows.preview(more).logits
    foreign = three_rows.preview(more, choice=ForeignChunks()).logits
    assert [len(bank) for bank in three_rows.banks] == sizes
    (segment,) = three_rows.stream(more)
    assert torch.equal(first, segment.logits)
    assert not torch.allclose(foreign, segment.logits)


def test_several_choices_are_tried_after_one_stream(llama, small, text):
    more = text(8, seed=1)
    choices = [Ranked(0), Ranked(5)]
    with MemoryDecoder(llama, None, small(top_k=4)) as decoder:
        decoder.read(text(96))
        both = decoder.preview(more.expand(2, -1), choice=choices)
        for row, choice in enumerate(choices):
            alone = decoder.preview(more, choice=choice)
            assert torch.equal(alone.retrievals[0].ids, both.retrievals[row].ids)
            torch.testing.assert_close(alone.logits[0], both.logits[row], rtol=1e-4, atol=1e-5)
        assert not torch.equal(both.retrievals[0].ids, both.retrievals[1].ids)
        assert decoder.tokens_read == (96,)
        with pytest.raises(InvalidArgumentError, match=r"one element for each of the 3 rows, .* got 2"):
            decoder.preview(more.expand(3, -1), choice=choices)


@pytest.mark.parametrize(("tokens", "message"), [(9, "at most the 8 tokens"), (0, "at least one token")])
def test_a_preview_is_at_most_a_segment(three_rows, text, tokens, message):
    with pytest.raises(InvalidArgumentError, match=message):
        three_rows.preview(text(9, rows=3)[:, :tokens])


def test_a_query_of_ones_own_is_asked_once_and_as_an_answer_asks(three_rows, text):
    asked = Passage(tuple(text(6, seed=7)[0].tolist()), 96)
    ids = text(16, seed=1, rows=3)
    usual = three_rows.preview(ids[:, :8]).retrievals
    segments = three_rows.stream(ids, queries=[asked.token_ids, None, None])
    first, bank, retriever = next(segments), three_rows.banks[0], three_rows.retriever
    focused = retriever.embed_focus([asked], bank.mean_embedding()[None], [len(bank)])
    assert torch.equal(first.retrievals[0].query, focused[0].cpu())
    assert torch.equal(first.retrievals[1].query, usual[1].query)
    assert not torch.equal(next(segments).retrievals[0].query, focused[0].cpu())


@pytest.mark.parametrize("retrieve_for", ["all", "answers"])
def test_text_with_a_query_retrieves_whatever_it_is(llama, small, text, retrieve_for):
    with MemoryDecoder(llama, None, small(retrieve_for=retrieve_for, focus_tokens=0)) as decoder:
        decoder.read(text(80, rows=2))
        asked = text(6, seed=7)[0].tolist()
        segment, later = decoder.stream(text(16, seed=1, rows=2), queries=[None, asked])
        query = decoder.retriever.embed_queries([Passage(tuple(asked), 80)])[0]
    assert torch.equal(segment.retrievals[1].query, query)
    assert (segment.retrievals[0] is None) == (retrieve_for == "answers")
    assert (later.retrievals[1] is None) == (retrieve_for == "answers")


def test_a_query_without_a_memory_is_refused(llama, small, text):
    with (
        MemoryDecoder(llama, None, small(backend=None)) as decoder,
        pytest.raises(InvalidArgumentError, match="queries must be None with backend None"),
    ):
        decoder.stream(text(8), queries=[[1, 2]])


def test_an_answer_does_not_ask_with_a_query_that_was_not_used(llama, small, text, monkeypatch):
    asked, seen = tuple(text(6, seed=7)[0].tolist()), []
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(80))
        embed = decoder.retriever.embed_focus
        monkeypatch.setattr(
            decoder.retriever,
            "embed_focus",
            lambda queries, *rest: (seen.extend(queries), embed(queries, *rest))[1],
        )
        (_,) = decoder.stream(text(8, seed=1), queries=[asked])
        assert seen.pop().token_ids == asked
        decoder.read(text(2, seed=1))
        (_,) = decoder.stream(text(2, seed=2), queries=[asked])  # in the middle of a segment
        decoder.generate(text(2, seed=3), max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert seen
    assert all(each.token_ids != asked for each in seen)


def next_query(decoder, text):
    """What is asked for when the next segment begins."""
    _rest, begun = decoder.stream(text(decoder.config.segment_size, seed=3))
    return begun.retrievals[0].query


def test_a_query_given_in_the_middle_of_a_segment_is_saved(llama, small, text, tmp_path):
    asked, found = text(6, seed=7)[0].tolist(), []
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(90))
        assert not decoder._streams.batch.streams[0].begins_segment()
        (_,) = decoder.stream(text(2, seed=2), queries=[asked])
        decoder.save(tmp_path / "saved")
        found.append(next_query(decoder, text))
    with MemoryDecoder.load(tmp_path / "saved", llama, None, small()) as loaded:
        found.append(next_query(loaded, text))
    assert torch.equal(*found)


@pytest.mark.parametrize("queries", [[[1]], [[1], [], None], [[1], [10**9], None], [[1], ["a"], None], 3])
def test_a_query_of_something_else_than_token_ids_is_refused(three_rows, text, queries):
    with pytest.raises(InvalidArgumentError, match="queries must hold the token ids"):
        three_rows.stream(text(8, rows=3), queries=queries)


def test_contrast_logs_the_gain_and_weighs_by_it(trainer):
    steps = trainer(steps=6, rows=3, contrast=2.0, negatives=2).run()
    assert any(step.gain is not None for step in steps)
    assert all(step.gain is None for step in trainer(folder="other").run())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negatives": 4}, "at least 5 with negatives 4"),
        ({"rows": 1, "contrast": 1.0}, "at least 2 with contrast 1.0"),
        ({"contrast": 0.5}, "contrast must be 0 or at least 1, .* got 0.5"),
    ],
)
def test_foreign_chunks_need_other_rows(changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        TrainingConfig(**changes)


@pytest.mark.parametrize("changes", [{"negatives": 3}, {"contrast": 2.0}])
def test_a_row_has_other_texts_beside_it(decoder, text, tmp_path, changes):
    config = TrainingConfig(document_tokens=64, rows=4, lora_rank=2, **changes)
    three = [text(64, seed=seed)[0] for seed in range(3)]
    with pytest.raises(
        InvalidTextError, match=r"at least 4 episodes, as many as are read in parallel, .* got 3"
    ):
        Trainer(decoder(), three, config, folder=tmp_path)


def test_negatives_rise_in_the_first_half():
    config = TrainingConfig(steps=10, rows=9, negatives=8)
    assert [config.negatives_at(step) for step in range(10)] == [2, 4, 5, 7, 8, 8, 8, 8, 8, 8]


def test_distillation_needs_trained_positions(decoder, documents, tmp_path):
    config = TrainingConfig(distill=0.5, document_tokens=4096)
    with pytest.raises(InvalidArgumentError, match="document_tokens must be at most 512 with distill"):
        Trainer(decoder(), [each.repeat(30) for each in documents], config, folder=tmp_path / "run")


def test_a_preview_takes_random_chunks_too(three_rows, text):
    following = text(8, rows=3, seed=9)
    retrieved = three_rows.preview(following)
    random = three_rows.preview(following, choice=RandomChunks(1.0, torch.Generator().manual_seed(0)))
    assert not torch.equal(random.logits, retrieved.logits)
    for found in random.retrievals:
        assert sorted(found.ids.tolist()) == found.ids.tolist()


def test_foreign_chunks_of_the_same_text_give_the_same(llama, small, text):
    """So that only content makes a difference: they stand in the order of the text, and are as recent."""
    ids, contrasted = text(96, seed=1), 0
    with MemoryDecoder(llama, None, small()) as decoder:
        for start in range(0, 96, 8):
            new = ids[:, start : start + 8].repeat(2, 1)
            foreign = decoder.preview(new, choice=ForeignChunks())
            (own,) = decoder.stream(new)
            torch.testing.assert_close(foreign.logits, own.logits, rtol=1e-5, atol=1e-5)
            contrasted += own.retrievals[0] is not None
    assert contrasted == 9


def test_every_segment_that_retrieves_is_contrasted(trainer, monkeypatch):
    seen = []

    def spy(segment, *given, foreign, **options):
        seen.append((segment.retrievals[0] is not None, foreign is not None))
        return segment_loss(segment, *given, foreign=foreign, **options)

    monkeypatch.setattr("memlong.training.trainer.segment_loss", spy)
    trainer(contrast=2.0).run()
    assert len(set(seen)) == 2
    assert all(retrieved == tried for retrieved, tried in seen)


@pytest.mark.parametrize("choice", [3, [never(), 3]])
def test_what_cannot_choose_is_refused(three_rows, choice):
    with pytest.raises(InvalidArgumentError, match=r"choice must have a method choose\(\)"):
        three_rows.reset(choice=choice)


class Asked:
    """Counts how often it is asked."""

    def __init__(self):
        self.searches = []

    def choose(self, search):
        self.searches.append(search)


def test_a_choice_is_asked_until_the_next_reset(three_rows, text):
    asked = Asked()
    three_rows.reset(choice=asked)
    three_rows.read(text(64, rows=3))
    three_rows.preview(text(8, rows=3, seed=1))
    count = len(asked.searches)
    assert count == 3 * 5
    assert all(
        search.others == [*banks[row + 1 :], *banks[:row]]
        for row, search in enumerate(asked.searches[-3:])
        for banks in [three_rows.banks]
    )
    three_rows.flush()
    three_rows.read(text(64, rows=3, seed=2))
    assert len(asked.searches) > count
    three_rows.reset()
    count = len(asked.searches)
    three_rows.read(text(64, rows=3))
    assert len(asked.searches) == count


def test_what_is_asked_and_who_chooses_arrive_at_the_decoder(trainer, monkeypatch):
    """Queries at the segments that have them, for reading and for contrast; more other rows later on."""
    run = trainer(steps=12, rows=3, negatives=2, contrast=2.0)
    source, calls, choices = run._source, [], []

    class Asking:
        digest = source.digest

        def __getitem__(self, number):
            return replace(source[number], queries={40: [5, 6, number + 3]})

    run._source = Asking()
    for name in ("stream", "preview"):
        real = getattr(MemoryDecoder, name)

        def watched(self, *given, name=name, real=real, **options):
            calls.append((name, options["queries"], options.get("choice")))
            return real(self, *given, **options)

        monkeypatch.setattr(MemoryDecoder, name, watched)
    reset = MemoryDecoder.reset
    monkeypatch.setattr(
        MemoryDecoder, "reset", lambda self, **options: choices.append(options) or reset(self, **options)
    )
    run.run()
    asked = [(name, tuple(queries[0][:2])) for name, queries, _ in calls if queries[0] is not None]
    assert set(asked) == {("stream", (5, 6)), ("preview", (5, 6))}
    assert all(len(set(map(tuple, queries))) == 3 for _, queries, _ in calls if queries[0] is not None)
    assert all(isinstance(choice, ForeignChunks) for name, _, choice in calls if name == "preview")
    given = [options["choice"] for options in choices if "choice" in options]
    assert [[each.others for each in some] for some in given] == [[1] * 3, [2] * 3, [2] * 3]


class OldestFirst:
    """Prefers the oldest of what is found, as a retriever that reranks."""

    candidates = 50

    def rerank(self, candidates):
        return -candidates.ids.float()


def test_negatives_are_put_among_what_the_retriever_would_choose(three_rows):
    oldest = Reranking(OldestFirst(), Passage((3,), 0))
    for seed in range(5):
        negatives = Negatives(never(), 1, torch.Generator().manual_seed(seed))
        retrieval, _ = negatives.choose(search(three_rows, reranking=oldest))
        assert retrieval.ids.tolist() == list(range(len(retrieval.ids)))
