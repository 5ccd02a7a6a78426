"""What is attended to for a query: neighbours, a floor, a budget, an order, and where K-V comes from."""

from __future__ import annotations

import time

import pytest
import torch

from memlong import MemoryConfig, MemoryDecoder, create_bank
from memlong.decoder.recall import recall
from memlong.decoder.row import Row
from memlong.errors import InvalidArgumentError


def memories(decoder, ids):
    """Spans attended to in each segment, in the order in which they stand."""
    found = []
    for segment in decoder.stream(ids):
        del segment
        memory = decoder._streams.rows[0].memory
        found.append([] if memory is None else memory.spans.tolist())
    return found


def test_a_hit_brings_the_chunk_that_follows_it(llama, small, text):
    ids = text(200)
    with MemoryDecoder(llama, None, small(top_k=2)) as decoder:
        alone = memories(decoder, ids)
    with MemoryDecoder(llama, None, small(top_k=4, neighbours=1)) as decoder:
        together = memories(decoder, ids)
        stored = [start for start, _ in decoder.banks[0].fetch(decoder.banks[0].ids).spans.tolist()]
    assert all(len(spans) <= 4 for spans in together)
    for hits, spans in list(zip(alone, together, strict=True))[8:]:
        starts = [start for start, _ in spans]
        assert {hit for hit, _ in hits} <= set(starts)
        assert starts == sorted(starts)
        for hit, end in hits:
            assert end in starts or hit == max(starts) or end not in stored


def ends(bank, query, **settings):
    """Spans that are attended to for a query."""
    return recall(bank, query, MemoryConfig(chunk_size=4, **settings))[1].spans.tolist()


def two_texts():
    bank = create_bank("torch", 8)
    spans = [(start, start + 4) for start in (2, 6, 10, 14, 18, 22, 2, 6, 10)]
    blocks = torch.randn(9, 1, 1, 4, 2)
    bank.add(torch.eye(9, 8), blocks, blocks, spans)
    return bank


def test_neighbours_stop_where_a_text_ends():
    assert ends(two_texts(), torch.eye(8)[5], top_k=3, neighbours=2, min_score=0.5) == [[22, 26]]
    assert ends(two_texts(), torch.eye(8)[3], top_k=3, neighbours=2, min_score=0.5) == [
        [14, 18],
        [18, 22],
        [22, 26],
    ]


def test_what_neighbours_leave_of_the_budget_goes_to_further_hits():
    query = torch.tensor([0, 1.0, 0, 0, 0, 2.0, 0, 0])
    assert ends(two_texts(), query, top_k=3, neighbours=7, min_score=0.1) == [[6, 10], [10, 14], [22, 26]]


def test_by_score_a_hit_and_what_follows_it_stay_together():
    query = torch.tensor([2.0, 0, 0, 0, 1.0, 0, 0, 0])
    settings = {"top_k": 4, "neighbours": 1, "min_score": 0.1, "chunk_order": "score"}
    assert ends(two_texts(), query, **settings) == [[18, 22], [22, 26], [2, 6], [6, 10]]


def test_texts_in_one_bank_do_not_interleave():
    query = torch.tensor([1.0, 0, 0, 0, 1.0, 0, 1.0, 1.0])
    assert ends(two_texts(), query, top_k=4) == [[2, 6], [18, 22], [2, 6], [6, 10]]


def test_asking_for_more_than_there_is_costs_nothing_more(llama, small, text):
    with MemoryDecoder(llama, None, small(top_k=10**9)) as decoder:
        decoder.read(text(100))


def test_a_budget_in_tokens_is_kept(llama, small, text):
    with MemoryDecoder(llama, None, small(memory_tokens=11)) as decoder:
        assert max(len(spans) for spans in memories(decoder, text(100))) == 2


def test_nothing_below_the_floor_is_attended_to(llama, small, text):
    ids = text(150)
    with MemoryDecoder(llama, None, small()) as decoder:
        segments = list(decoder.stream(ids))
    scores = torch.cat([s.retrievals[0].scores for s in segments if s.retrievals[0] is not None])
    floor = float(scores.median())
    for neighbours in (0, 1):
        config = small(min_score=floor, neighbours=neighbours)
        with MemoryDecoder(llama, None, config) as decoder:
            for segment in decoder.stream(ids):
                retrieval, memory = segment.retrievals[0], decoder._streams.rows[0].memory
                near = 0 if retrieval is None else int((retrieval.scores >= floor).sum())
                assert (0 if memory is None else len(memory.spans)) >= near
                assert (memory is None) == (near == 0)
    with MemoryDecoder(llama, None, small(min_score=2.0)) as decoder:
        found = decoder.read(ids)
    with MemoryDecoder(llama, None, small(backend=None)) as decoder:
        torch.testing.assert_close(found, decoder.read(ids), rtol=0.0, atol=2e-5)


def test_by_score_the_best_stands_next_to_the_window(llama, small, text):
    with MemoryDecoder(llama, None, small(chunk_order="score")) as decoder:
        for segment in decoder.stream(text(120)):
            retrieval = segment.retrievals[0]
            if retrieval is not None:
                best = decoder.banks[0].fetch(retrieval.ids[:1]).spans[0].tolist()
                assert decoder._streams.rows[0].memory.spans[-1].tolist() == best


@pytest.mark.parametrize("mode", ["zero", "original"])
def test_the_order_makes_no_difference_where_positions_do_not_depend_on_it(llama, small, text, mode):
    found = []
    for order in ("position", "score"):
        with MemoryDecoder(llama, None, small(chunk_order=order, position_mode=mode)) as decoder:
            found.append(decoder.read(text(120)))
    torch.testing.assert_close(*found, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("store", [{"host": "all"}, {"device": 2000}, {"host": "10kB", "disk": "here"}])
def test_where_keys_and_values_are_kept_makes_no_difference(llama, small, text, tmp_path, store):
    if "disk" in store:
        store = store | {"disk": str(tmp_path)}
    with MemoryDecoder(
        llama, None, small(backend_options={"max_chunks": 9} if "device" in store else {})
    ) as decoder:
        expected = decoder.read(text(150))
    if "device" in store:
        store = {"device": 9 * decoder_bytes(decoder)}
    with MemoryDecoder(llama, None, small(store=store)) as decoder:
        torch.testing.assert_close(decoder.read(text(150)), expected, rtol=0.0, atol=0.0)


def decoder_bytes(decoder):
    return decoder.layout.nbytes


def test_rows_of_a_batch_have_stores_of_their_own(llama, small, text, tmp_path):
    with MemoryDecoder(llama, None, small(store={"disk": str(tmp_path)})) as decoder:
        decoder.read(text(100, rows=2))
        assert len({id(bank._store) for bank in decoder.banks}) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neighbours": -1}, "neighbours is -1"),
        ({"memory_tokens": 3}, r"memory_tokens is 3, less than one chunk \(4\)"),
        ({"min_score": "high"}, "min_score is 'high'; expected a number"),
        ({"chunk_order": "size"}, "chunk_order is 'size'; expected one of 'position', 'score'"),
        ({"retrieve_every": 9}, "retrieve_every is 9; expected at most segment_size, 8"),
    ],
)
def test_settings_that_cannot_work_are_named(small, settings, message):
    with pytest.raises(InvalidArgumentError, match=message):
        small(**settings)


def test_a_row_keeps_to_itself_after_a_fork(small):
    row = Row(small(), None)
    row.take([1, 2, 3])
    other = row.fork()
    other.take([4])
    assert (row.seen, other.seen) == (3, 4)
    assert row.query().token_ids == (1, 2, 3)


@pytest.mark.parametrize("neighbours", [3, 10**9])
def test_neighbours_without_bound_cost_no_more_than_there_is_room_for(llama, small, text, neighbours):
    with MemoryDecoder(llama, None, small(top_k=4, neighbours=neighbours)) as decoder:
        began = time.monotonic()
        decoder.read(text(120))
        assert time.monotonic() - began < 20
        assert decoder.tokens_read == (120,)
