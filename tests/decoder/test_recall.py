"""What is attended to for a query, and where K-V comes from."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from memlong import MemoryConfig, MemoryDecoder, Passage, create_bank
from memlong.decoder.retrievers.baselines import RandomRetriever
from memlong.decoder.stream.asking import ask
from memlong.decoder.stream.retrieval import Search, retrieve_chunks
from memlong.decoder.stream.token_stream import TokenStream
from memlong.errors import InvalidArgumentError


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


@pytest.mark.parametrize(
    ("cutoff", "expected"), [(0.0, 4), (0.1, 4), (0.3, 3), (0.5, 2), (0.51, 1), (1.0, 1)]
)
def test_chunks_far_below_the_best_are_left_out_of_answers(cutoff, expected):
    bank = create_bank("torch", 4)
    blocks = torch.randn(4, 1, 1, 4, 2)
    bank.add(torch.eye(4), blocks, blocks, [(4 * each, 4 * each + 4) for each in range(4)])
    query = torch.tensor([0.3, 1.0, 0.1, 0.5])
    kept = sorted([1, 3, 0, 2][:expected])
    config = MemoryConfig(chunk_size=4, answer_cutoff=cutoff)
    retrieval, memory = retrieve_chunks(bank, query, config)
    assert sorted(retrieval.ids.tolist()) == kept
    assert memory.spans.tolist() == [[4 * each, 4 * each + 4] for each in kept]
    assert torch.equal(Search(bank, query, config).best().ids, retrieval.ids)
    bank.remove([3])
    for other in (-query, torch.tensor([0, 0, 0, 1.0])):  # nothing is similar
        assert len(retrieve_chunks(bank, other, config)[0].ids) == 3


class Noting:
    """Chooses nothing, and notes what cutoffs it is told of."""

    def __init__(self):
        self.cutoffs = []

    def choose(self, search):
        self.cutoffs.append(search.config.answer_cutoff)


def test_what_chooses_in_training_knows_the_cutoff_of_answers(llama, small, text):
    choice = Noting()
    with MemoryDecoder(llama, None, small(answer_cutoff=0.5)) as decoder:
        decoder.read(text(80))
        for stream in decoder._streams.batch.streams:
            stream.choice = choice
        decoder.read(text(16))
        list(decoder.stream(text(8), queries=[[5, 6, 7, 8, 9]]))
    assert {*choice.cutoffs[:-1]} == {0.0}
    assert choice.cutoffs[-1] == 0.5


def test_a_retriever_that_compares_by_distance_has_no_cutoff(llama, small):
    class ByDistance(RandomRetriever):
        metric = "l2"

    retriever = ByDistance(llama, None)
    MemoryDecoder(llama, None, small(), retriever=retriever)
    with pytest.raises(
        InvalidArgumentError, match=r"answer_cutoff must be 0 with ByDistance, got 0\.5: it is a"
    ):
        MemoryDecoder(llama, None, small(answer_cutoff=0.5), retriever=retriever)


def test_only_answers_and_given_queries_leave_chunks_out(llama, small, text):
    counts = {}
    for cutoff in (0.0, 1.0):
        with MemoryDecoder(llama, None, small(answer_cutoff=cutoff)) as decoder:
            read = [each.retrievals[0] for each in decoder.stream(text(100))]
            given = [each.retrievals[0] for each in decoder.stream(text(8), queries=[[5, 6, 7, 8, 9]])]
            forks, _ = ask(decoder._streams.batch, decoder.config)
            counts[cutoff] = [
                [len(each.ids) for each in found if each is not None]
                for found in (read, given, [forks.streams[0].retrieval])
            ]
    assert counts[0.0][0] == counts[1.0][0]
    assert counts[0.0][1:] == [[decoder.config.top_k]] * 2
    assert counts[1.0][1:] == [[1], [1]]


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
    assert [[len(each.token_ids) for each in some] for some in (queries, later)] == [[12, 12], [12, 12]]
    assert {each.half_life for some in (queries, later) for each in some} == {3}
    assert [queries[0].end, later[0].end] == [84, 87]
    torch.testing.assert_close(means[0], torch.cat([bank.embeddings.embeddings, drafted]).mean(dim=0))


@pytest.fixture
def asked(monkeypatch):
    """Records what a decoder focuses on."""

    def record(decoder):
        found, embed = [], decoder.retriever.embed_focus
        monkeypatch.setattr(
            decoder.retriever,
            "embed_focus",
            lambda queries, means, sizes: (found.extend(queries), embed(queries, means, sizes))[1],
        )
        return found

    return record


def test_an_answer_asks_with_all_it_needs_however_short_other_queries_are(llama, small, text, asked):
    ids = text(93)
    with MemoryDecoder(llama, None, small(query_tokens=1, focus_tokens=8)) as decoder:
        found = asked(decoder)
        decoder.read(ids)
        (stream,) = decoder._streams.batch.streams
        assert stream.seen - stream.first_token < 32
        ask(decoder._streams.batch, decoder.config)
    assert found == [Passage(tuple(ids[0, 61:].tolist()), 61, half_life=8)]


def test_a_query_that_was_given_counts_alike(llama, small, text, asked):
    with MemoryDecoder(llama, None, small(focus_tokens=3)) as decoder:
        found = asked(decoder)
        decoder.read(text(80))
        decoder.preview(text(8), queries=[[5, 6, 7, 8, 9]])
    assert [(each.token_ids, each.half_life) for each in found] == [((5, 6, 7, 8, 9), None)]


def test_a_focus_with_nothing_left_asks_with_its_latest_tokens(llama, small, text, monkeypatch):
    asked = []
    with MemoryDecoder(llama, None, small(retriever="recent", focus_tokens=3)) as decoder:
        embed = decoder.retriever.embed_queries
        decoder.read(text(80))
        monkeypatch.setattr(
            decoder.retriever, "embed_queries", lambda queries: (asked.append(queries), embed(queries))[1]
        )
        ask(decoder._streams.batch, decoder.config)
    assert {len(each.token_ids) for queries in asked for each in queries} == {3}


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
