"""The controls of the benches: a memory of another text, and a choice of chunks that peeks."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from memlong import MemoryDecoder
from memlong.decoder.stream.retrieval import StreamMemory
from memlong.errors import InvalidArgumentError, InvalidTextError, MemlongError
from memlong.evaluation import evaluate_perplexity


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    return importlib.import_module


@pytest.fixture
def foreign(bench):
    return bench("systems.foreign").ForeignMemory


@pytest.fixture
def oracle(bench):
    return bench("systems.oracle").PeekingOracle


@pytest.fixture
def read_with():
    def read_with(decoder, new, spans, bank=None):
        """Read a segment, attending to the chunks of a bank, by default its own, that have these spans."""
        batch = decoder._streams.for_rows(1)
        decoder._streams.take_over(batch)
        (stream,) = batch.streams
        batch._store({0: stream.departing()})
        bank = bank or stream.bank
        ids = {
            tuple(span): each
            for each, span in zip(bank.ids.tolist(), bank.spans_of(bank.ids).tolist(), strict=True)
        }
        stream.memory = StreamMemory.of_chunks(bank.fetch([ids[tuple(span)] for span in spans]))
        return batch.advance(new.tolist(), 0, retrieve=lambda _: False).logits

    return read_with


def chosen(decoder, segment, bank=None):
    """The spans of what was retrieved for a segment, in the order of the text."""
    (retrieval,) = segment.retrievals
    bank = bank or decoder.memory.banks[0]
    return [] if retrieval is None else bank.spans_of(retrieval.ids.sort().values).tolist()


def departed(segment, config):
    """The spans of the chunks that have left the window where a segment begins."""
    held = int(segment.tokens[0, 0]) - config.sink_tokens - config.window_past
    starts = [
        config.sink_tokens + number * config.chunk_size for number in range(-(-held // config.chunk_size))
    ]
    return [[start, start + config.chunk_size] for start in starts]


@pytest.mark.parametrize("mode", ["original", "before-window", "zero"])
def test_a_foreign_memory_has_chunks_of_another_text_in_the_places_of_its_own(
    llama, small, text, foreign, read_with, mode
):
    config = small(top_k=99, position_mode=mode)
    decoder = foreign(llama, None, config, tokens=96)
    other, expected = (MemoryDecoder(llama, None, config) for _ in range(2))
    with decoder:
        found = list(decoder.stream(text(90)))
    with other:
        other.read(decoder.foreign_ids)
        other.flush()
    (bank,) = other.banks
    with expected:
        for segment in found:
            spans = departed(segment, config)
            assert chosen(decoder, segment, bank) == spans
            torch.testing.assert_close(segment.logits, read_with(expected, segment.input_ids, spans, bank))


def test_a_foreign_memory_chooses_and_reads_as_a_memory_does(llama, small, text, foreign):
    ids, config = text(90), small()
    decoder, memory = foreign(llama, None, config, tokens=96), MemoryDecoder(llama, None, config)
    decoder.foreign_ids = ids  # of the same text, it is that memory
    for _ in range(2):
        with memory:
            expected = evaluate_perplexity(memory, ids)
        with decoder:
            found = evaluate_perplexity(decoder, ids)
        torch.testing.assert_close(found.token_nll, expected.token_nll)


def test_a_foreign_text_must_be_long_enough(llama, small, text, foreign):
    with (
        foreign(llama, None, small(), tokens=40) as decoder,
        pytest.raises(InvalidTextError, match=r"of which 10 chunks have left the window, got 9 chunks: give"),
    ):
        decoder.read(text(90))


@pytest.mark.parametrize("candidates", [2, 32])
def test_an_oracle_chooses_the_chunk_that_alone_gives_the_lowest_loss(
    llama, small, text, oracle, read_with, candidates
):
    ids, config = text(60), small(top_k=1)
    decoder, memory = oracle(llama, None, config, candidates=candidates), MemoryDecoder(llama, None, config)
    with decoder:
        found = list(decoder.stream(ids))
    before = []
    for segment in found:
        begin = int(segment.tokens[0, 0])
        targets = ids[0, begin + 1 : begin + config.segment_size + 1]
        losses = {}
        for span in departed(segment, config):
            with memory:
                memory.reset()
                for new, spans in before:
                    read_with(memory, new, spans)
                query = memory._streams.batch.streams[0].query()
                logits = read_with(memory, segment.input_ids, [span])[0, : len(targets)]
            losses[tuple(span)] = float(cross_entropy(logits, targets, reduction="sum"))
        if losses:
            scores = memory.banks[0].search(memory.retriever.embed_queries([query]), candidates)
            tried = memory.banks[0].spans_of(scores.ids[scores.ids >= 0]).tolist()
            assert len(tried) == min(candidates, len(losses))
            (mine,) = chosen(decoder, segment)
            assert tuple(mine) == min((tuple(span) for span in tried), key=losses.get)
            logits = segment.logits[0, : len(targets)]
            assert float(cross_entropy(logits, targets, reduction="sum")) == pytest.approx(
                losses[tuple(mine)]
            )
        before.append((segment.input_ids, chosen(decoder, segment)))


@pytest.mark.parametrize("changes", [{}, {"position_mode": "original"}, {"attended_tokens": 4}])
def test_an_oracles_tries_leave_no_trace(llama, small, text, oracle, read_with, changes):
    ids, config = text(90), small(**changes)
    decoder, memory = oracle(llama, None, config), MemoryDecoder(llama, None, config)
    with decoder:
        found = list(decoder.stream(ids))
    with memory:
        for segment in found:
            expected = read_with(memory, segment.input_ids, chosen(decoder, segment))
            assert torch.equal(segment.logits, expected)
    (mine,), (theirs,) = decoder.memory.banks, memory.banks
    mine, theirs = mine.fetch(mine.ids), theirs.fetch(theirs.ids)
    for name in ("ids", "spans", "keys", "values"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name))


@pytest.mark.parametrize(("late", "is_seen"), [(7, True), (8, True), (9, False)])
def test_an_oracle_peeks_at_a_segment_of_8_tokens_and_the_next_one(llama, small, text, oracle, late, is_seen):
    ids, choices = text(50, seed=1), set()
    for token in (3, 9, 20, 30):
        ids[0, 40 + late] = token
        with oracle(llama, None, small(top_k=1)) as decoder:
            decoder.read(ids[:, :40])
            choices.add(str(chosen(decoder, next(decoder.stream(ids[:, 40:])))))
    assert (len(choices) > 1) == is_seen


def test_without_a_token_to_peek_at_an_oracle_chooses_as_a_memory_does(llama, small, text, oracle):
    ids, chosen_by = text(41), []
    for decoder in (oracle(llama, None, small()), MemoryDecoder(llama, None, small())):
        with decoder:
            decoder.read(ids[:, :40])
            (segment,) = decoder.stream(ids[:, 40:])
        chosen_by.append(segment.retrievals[0].ids.tolist())
    assert chosen_by[0] == chosen_by[1]


@pytest.mark.parametrize("kind", ["foreign, tokens=64", "oracle"])
def test_what_chooses_only_reads(llama, small, text, bench, kind):
    system = bench("systems").described(f"mine: kind={kind}", small())
    with system.decoder(llama, None) as decoder:
        decoder.read(text(40))
        with pytest.raises(MemlongError, match="does not generate, it only reads: leave the system out"):
            decoder.generate(text(4), max_new_tokens=1)
        with pytest.raises(MemlongError, match="does not score continuations, it only reads"):
            decoder.score(text(4), [[5]])


def test_kinds_have_options_of_their_own(llama, small, bench):
    described = bench("systems").described
    system = described("mine: kind=oracle, candidates=5, top_k=2", small())
    assert system.settings["candidates"] == 5
    assert system.config == small(top_k=2)
    assert system.decoder(llama, None).candidates == 5
    with pytest.raises(InvalidArgumentError, match="candidates must be an integer of at least 1, got 0"):
        described("mine: kind=oracle, candidates=0", small()).decoder(llama, None)
    with pytest.raises(InvalidArgumentError, match="MemoryConfig has no setting 'candidates'"):
        described("mine: kind=foreign, candidates=5", small())


def test_tries_of_an_oracle_shall_not_decide_what_a_bank_keeps(llama, small, oracle):
    config = small(backend_options={"max_chunks": 4, "eviction": "lru"})
    with pytest.raises(InvalidArgumentError, match=r"eviction must be 'fifo' for an oracle, .*, got 'lru'"):
        oracle(llama, None, config)
