"""Trained maps of queries: what chunks are tried, what a map learns of it, and that it is the same each time."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from memlong import MemoryDecoder
from memlong.errors import InvalidArgumentError
from memlong.training import Tries, fit_query_map, gain_share, train_retriever, try_chunks


@pytest.fixture
def decoder(llama, small):
    with MemoryDecoder(llama, None, small()) as made:
        yield made


def swapped(segments, seed):
    """Chunks that help where they are like the query with two halves exchanged."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(segments, 12, generator=generator)
    chunks = normalize(torch.randn(segments, 6, 12, generator=generator), dim=2)
    wanted = normalize(queries.roll(6, dims=1), dim=1)
    losses = 3 - torch.einsum("sd,scd->sc", wanted, chunks)
    order = torch.einsum("sd,scd->sc", queries, chunks).argsort(dim=1, descending=True)
    chunks = chunks.gather(1, order[..., None].expand_as(chunks))
    return Tries(queries, chunks, losses.gather(1, order), torch.arange(segments) // 10)


def test_a_loss_is_that_of_the_segment_with_one_chunk_alone(decoder, text):
    """Against a stream whose choice is that chunk, for every candidate of the last segment."""
    ids = text(120)
    tries = try_chunks(decoder, [ids], candidates=6, seed=3)
    assert tries.chunks.shape == (len(tries), 6, decoder.retriever.dim)
    assert decoder.tokens_read == (120,)
    decoder.reset()
    decoder.read(ids[:, :112])
    alone, seen = [], []
    bank = decoder.banks[0]

    class One:
        def __init__(self, chunk):
            self.chunk = chunk

        def choose(self, search):
            bank, query = search.bank, search.query
            found = bank.search(query[None], len(bank))
            place = int((bank.embeddings_of(found.ids[0]) @ self.chunk).argmax())
            seen.append(float(bank.embeddings_of(found.ids[0][place : place + 1])[0] @ self.chunk))
            chunks = bank.fetch(found.ids[0][place : place + 1])
            return decoder_retrieval(query, chunks.ids), chunks

    for chunk in tries.chunks[-1]:
        logits = decoder.preview(ids[:, 112:], choice=One(chunk)).logits[0]
        alone.append(float(cross_entropy(logits[:-1], ids[0, 113:])))
    assert min(seen) > 0.999  # each is the chunk that was tried
    assert len(bank) > 6
    torch.testing.assert_close(tries.losses[-1], torch.tensor(alone), rtol=1e-4, atol=1e-5)


def decoder_retrieval(query, ids):
    from memlong.decoder import Retrieval

    return Retrieval(query, ids, torch.zeros(len(ids)))


def test_the_first_half_are_the_best_and_the_others_are_not(decoder, text):
    tries = try_chunks(decoder, [text(120), text(90, seed=1)], candidates=6)
    likeness = torch.einsum("sd,scd->sc", tries.queries, tries.chunks)
    best, others = likeness[:, :3], likeness[:, 3:]
    assert (best.diff(dim=1) <= 1e-6).all()
    assert (others.max(dim=1).values <= best[:, 2] + 1e-6).all()
    assert tries.passages.unique().tolist() == [0, 1]


def test_trying_leaves_the_stream_as_it_is(decoder, text):
    ids = text(120)
    try_chunks(decoder, [ids], candidates=4)
    after = decoder.preview(ids[:, :8]).logits
    decoder.reset()
    decoder.read(ids)
    torch.testing.assert_close(after, decoder.preview(ids[:, :8]).logits)


def test_a_map_learns_which_chunks_help():
    tries = swapped(800, seed=0)
    found = fit_query_map(tries, rank=12, weight_decay=0.0)
    unseen = swapped(200, seed=1)
    assert gain_share(unseen) < 0.3
    assert gain_share(unseen, found.query_map) > 0.8
    assert (found.segments, found.held_out) == (640, 160)
    assert found.share > 0.8 > found.base_share
    assert found.epochs > 5


def test_a_map_that_has_learned_nothing_changes_nothing():
    tries = swapped(60, seed=0)
    found = fit_query_map(tries, epochs=0)
    assert found.epochs == 0
    assert torch.equal(found.query_map(tries.queries), tries.queries)
    assert found.share == found.base_share


def test_a_rank_is_checked():
    with pytest.raises(InvalidArgumentError, match="rank must be"):
        fit_query_map(swapped(60, 0), rank=-1)


def test_rank_0_weighs_components_alone():
    found = fit_query_map(swapped(100, seed=0), rank=0)
    assert found.query_map.down.shape == (0, 12)


def test_the_same_seed_gives_the_same_map(decoder, text):
    passages = [text(120, seed=number) for number in range(3)]
    first, again = (train_retriever(decoder, passages, candidates=4, rank=2, seed=7) for _ in range(2))
    other = train_retriever(decoder, passages, candidates=4, rank=2, seed=8)
    for name, each in first.query_map.named_parameters():
        assert torch.equal(each, dict(again.query_map.named_parameters())[name])
    assert not torch.equal(first.query_map.down, other.query_map.down)
    assert first.query_map.made_for[1] == "lm"


def test_what_cannot_be_trained_is_told(llama, small, text):
    def error(passages, changes=None, **options):
        with MemoryDecoder(llama, None, small(**(changes or {}))) as decoder:
            with pytest.raises(InvalidArgumentError) as raised:
                train_retriever(decoder, passages, **options)
            return str(raised.value)

    two = [text(120), text(120)]
    assert "passages must be long enough for 8 chunks of 4 tokens" in error([text(30), text(30)])
    assert "passages must be a list of tensors" in error([[1, 2], [3]])
    assert "candidates must be an integer of at least 2" in error(two, candidates=1)
    assert "rank must be an integer" in error(two, rank=-1)
    assert "backend must name a memory backend" in error(two, {"backend": None})
    assert "retrieve_for must be 'all'" in error(two, {"retrieve_for": "answers"})
    assert "got RecentRetriever, which does by 'inner_product'" in error(two, {"retriever": "recent"})
    with pytest.raises(
        InvalidArgumentError, match=r"tries must hold 5 segments of a passage or more, .* got 2 in all"
    ):
        fit_query_map(Tries(torch.ones(2, 3), torch.ones(2, 4, 3), torch.ones(2, 4), torch.zeros(2)))
