"""What is attended to for a query, and where K-V comes from."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from memlong import MemoryConfig, MemoryDecoder, Passage, create_bank
from memlong.decoder.stream.retrieval import retrieve_chunks
from memlong.decoder.stream.token_stream import TokenStream


def ends(bank, query, **settings):
    """Spans that are attended to for a query."""
    return retrieve_chunks(bank, query, MemoryConfig(chunk_size=4, **settings))[1].spans.tolist()


def two_texts():
    bank = create_bank("torch", 8)
    spans = [(start, start + 4) for start in (2, 6, 10, 14, 18, 22, 2, 6, 10)]
    blocks = torch.randn(9, 1, 1, 4, 2)
    bank.add(torch.eye(9, 8), blocks, blocks, spans)
    return bank


def test_texts_in_one_bank_do_not_interleave():
    query = torch.tensor([1.0, 0, 0, 0, 1.0, 0, 1.0, 1.0])
    assert ends(two_texts(), query, top_k=4) == [[2, 6], [18, 22], [2, 6], [6, 10]]


def test_only_what_is_generated_has_a_focus(llama, small, text, monkeypatch):
    asked = []
    with MemoryDecoder(llama, None, small(focus_tokens=3, retrieve_every=4)) as decoder:
        embed = decoder.retriever.embed_focus
        monkeypatch.setattr(
            decoder.retriever,
            "embed_focus",
            lambda queries, means, sizes: (asked.append((queries, means)), embed(queries, means, sizes))[1],
        )
        decoder.read(text(80, rows=2))
        assert not asked
        bank = decoder.banks[0]
        decoder.generate(
            text(4, rows=2), max_new_tokens=6, do_sample=False, eos_token_id=None, remember=False
        )
        (queries, means), (later, _) = asked
        # The chunks that leave the window for the prompt.
        starts = [2 + 4 * (len(bank) + number) for number in range(2)]
        left = [Passage(tuple(text(80, rows=2)[0, start : start + 4].tolist()), start) for start in starts]
        drafted = functional.normalize(decoder.retriever.embed_chunks(left), dim=1)
    assert [[len(each.token_ids) for each in some] for some in (queries, later)] == [[3, 3], [3, 3]]
    assert [queries[0].end, later[0].end] == [84, 87]
    torch.testing.assert_close(means[0], torch.cat([bank.embeddings.embeddings, drafted]).mean(dim=0))


def test_a_cutoff_leaves_out_what_scores_far_below_the_best(llama, small, text):
    ids, found = text(84), {}
    for cutoff in (0.0, 0.6, 1.0):
        config = small(top_k=8, focus_tokens=3, focus_cutoff=cutoff)
        with MemoryDecoder(llama, None, config) as decoder, torch.no_grad():
            *_, last = decoder.stream(ids[:, :80])
            assert len(last.retrievals[0].ids) == 8  # what is read has no focus
            found[cutoff] = decoder.preview(ids[:, 80:], queries=[ids[0, 20:23].tolist()]).retrievals[0]
    scores = found[0.0].scores
    assert len(scores) == 8
    assert scores[0] > 0
    for cutoff in (0.6, 1.0):
        kept = scores >= cutoff * scores[0]
        assert 0 < kept.sum() < 8
        assert torch.equal(found[cutoff].ids, found[0.0].ids[kept])


@pytest.mark.parametrize("best", [0.0, -1.0])
def test_a_cutoff_keeps_all_where_no_score_is_positive(best):
    bank = create_bank("torch", 8)
    blocks = torch.randn(3, 1, 1, 4, 2)
    bank.add(torch.eye(3, 8), blocks, blocks, [(start, start + 4) for start in (2, 6, 10)])
    query = torch.tensor([best] * 3 + [1.0] * 5)
    assert len(ends(bank, query, top_k=3, focus_cutoff=0.5)) == 3


def test_what_follows_a_chunk_comes_with_it(llama, small, text):
    ids, found = text(84), {}
    for following in (0, 1, 2):
        config = small(top_k=5, focus_tokens=3, focus_following=following)
        with MemoryDecoder(llama, None, config) as decoder, torch.no_grad():
            decoder.read(ids[:, :80])
            found[following] = decoder.preview(ids[:, 80:], queries=[ids[0, 20:23].tolist()]).retrievals[0]
            last = int(decoder.banks[0].ids.max())
    alone = found[0].ids.tolist()
    for following in (1, 2):
        runs = [each + number for each in alone for number in range(following + 1)]
        assert found[following].ids.tolist() == [*dict.fromkeys(each for each in runs if each <= last)][:5]
    score = dict(zip(alone, found[0].scores.tolist(), strict=True))
    assert found[1].scores[1] == found[1].scores[0] == pytest.approx(score[alone[0]])


def test_what_follows_is_of_the_same_text():
    query = torch.tensor([0.0, 0, 0, 0, 0, 1.0, 0, 0])  # the last chunk of the first of two texts
    assert ends(two_texts(), query, top_k=1, focus_following=10**9) == [[22, 26]]
    assert ends(two_texts(), query.roll(-2), top_k=3, focus_following=2) == [[14, 18], [18, 22], [22, 26]]


def test_a_focus_that_has_nothing_of_its_own_asks_as_it_is(llama, small, text):
    with MemoryDecoder(llama, None, small(retriever="recent")) as decoder:
        decoder.read(text(80))
        batch = decoder._streams.forked(1)
        stream = batch.streams[0]
        stream.is_answer = True
        batch._retrieve(batch.streams)
    assert stream.retrieval.query.tolist() == [1]
    assert stream.retrieval.ids.tolist() == [13, 12, 11]


def test_asking_for_more_than_there_is_costs_nothing_more(llama, small, text):
    with MemoryDecoder(llama, None, small(top_k=10**9)) as decoder:
        decoder.read(text(100))


@pytest.mark.parametrize(
    "store",
    [
        {"host": "all"},
        {"device": 2000},
        {"host": "10kB", "disk": "here"},
        {"objects": "memory://kv"},
        {"host": "10kB", "objects": "memory://kv"},
    ],
)
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
        assert len({id(bank.state.store) for bank in decoder.banks}) == 2


def test_a_stream_is_independent_of_its_fork(small):
    stream = TokenStream(small(), None)
    stream.take([1, 2, 3])
    other = stream.fork()
    other.take([4])
    assert (stream.seen, other.seen) == (3, 4)
    assert stream.query().token_ids == (1, 2, 3)
