"""Fusing the rankings of several retrievers, and the hook by which any retriever may rank anew."""

from __future__ import annotations

import math

import pytest
import torch

from memlong import Candidates, LayeredBank, MemoryDecoder, Passage, Retriever
from memlong.decoder import create_retriever
from memlong.decoder.retrievers.baselines import RandomRetriever
from memlong.decoder.retrievers.hybrid import HybridRetriever
from memlong.decoder.stream.asking import ask
from memlong.decoder.stream.retrieval import Reranking
from memlong.errors import InvalidArgumentError, SnapshotError, UnknownNameError
from memlong.plugins import Registry

PARTS = {"retrievers": "lm,random", "lm.dim": 64, "lm.recency": 0, "random.dim": 32, "candidates": 10**4}
TWO = "retrievers must be the names of two or more different ones"


class Words:
    """A tokenizer as far as retrievers need one."""

    def decode(self, token_ids):
        return " ".join(map(str, token_ids))


class Said(Retriever):
    """Embeds a passage as what it is told for its start."""

    metric = "cosine"

    def __init__(self, said, model=None):
        super().__init__(model, None)
        self.said = {start: torch.tensor(each, dtype=torch.float32) for start, each in said.items()}

    @property
    def dim(self):
        return len(next(iter(self.said.values())))

    def embed_chunks(self, chunks):
        return torch.stack([self.said[chunk.start] for chunk in chunks])

    def embed_queries(self, queries):
        return self.embed_chunks(queries)


class Choosy(RandomRetriever):
    """Prefers the chunks of the largest spans, and refuses those that start at an odd multiple of four."""

    candidates = 6

    def __init__(self, model=None, made=None):
        super().__init__(model, None, dim=8)
        self.seen, self.made = [], made

    def rerank(self, found):
        self.seen.append(found)
        starts = found.spans[:, 0]
        scores = starts.double().masked_fill((starts - 2) % 8 != 0, -torch.inf)
        return scores if self.made is None else self.made(scores)


def chunk_passages(ids, *spans):
    return [Passage(tuple(ids[start:end].tolist()), start) for start, end in spans]


def fused(rankings, weights=None):
    """Reciprocal rank fusion of scores {id: number} by its definition, in exact sums; the ids, best first."""
    shares = {each: [] for each in rankings[0]}
    for scores, weight in zip(rankings, weights or [1] * len(rankings), strict=True):
        for rank, each in enumerate(sorted(scores, key=lambda each: (-scores[each], each)), start=1):
            shares[each].append(weight / (60 + rank))
    totals = {each: math.fsum(share) for each, share in shares.items()}
    return sorted(totals, key=lambda each: (-totals[each], each)), totals


def cosines(retriever, query, chunks, ids):
    """Float64 cosines by id, rounded once, as ties are those of float32."""
    wide = [
        torch.nn.functional.normalize(each.double(), dim=1)
        for each in (retriever.embed_queries([query]), retriever.embed_chunks(chunks))
    ]
    return dict(zip(ids, (wide[1] @ wide[0][0]).float().tolist(), strict=True))


def expected(decoder, query, ids, tokens, weights=None):
    """What complete rankings by each retriever of the decoder give."""
    spans = decoder.banks[0].spans_of(ids).tolist()
    chunks = chunk_passages(tokens, *spans)
    return fused(
        [cosines(each, query, chunks, ids.tolist()) for each in decoder.retriever._retrievers], weights
    )


@pytest.mark.parametrize("weights", [None, "2,0.5"])
def test_it_is_the_fusion_of_complete_rankings_if_all_chunks_are_candidates(
    llama, small, text, backend, weights
):
    options = PARTS | ({} if weights is None else {"weights": weights})
    config = small(backend=backend, retriever="hybrid", retriever_options=options)
    numbers = None if weights is None else [float(each) for each in weights.split(",")]
    tokens, checked = text(200), 0
    with MemoryDecoder(llama, None, config) as decoder:
        for segment in decoder.stream(tokens):
            (retrieval,) = segment.retrievals
            if retrieval is None:
                continue
            start = int(segment.tokens[0, 0])
            query = Passage(tuple(tokens[0, start - 8 : start].tolist()), start - 8)
            ids, totals = expected(decoder, query, decoder.banks[0].ids, tokens[0], numbers)
            assert retrieval.ids.tolist() == ids[:3]
            torch.testing.assert_close(retrieval.scores, torch.tensor([totals[each] for each in ids[:3]]))
            checked += 1
    assert checked > 15


def test_only_the_best_by_the_sum_of_cosines_are_candidates(llama, small, text):
    config = small(retriever="hybrid", retriever_options=PARTS | {"candidates": 5})
    tokens = text(160)
    with MemoryDecoder(llama, None, config) as decoder:
        decoder.read(tokens)
        (stream,) = decoder._streams.batch.streams
        bank, query = decoder.banks[0], decoder.retriever.embed_queries([stream.query()])
        best = bank.search(query, 5).ids[0].sort().values
        assert len(bank) > 20
        stream.retrieve(query[0], decoder.retriever)
        ids, _ = expected(decoder, stream.query(), best, tokens[0])
    assert stream.retrieval.ids.tolist() == ids[:3]


def test_a_sum_of_weighted_cosines_is_what_the_bank_compares(llama):
    parts = [create_retriever("lm", llama, None, {"dim": 64}), RandomRetriever(llama, None)]
    hybrid = HybridRetriever(parts, weights=[2, 0.5])
    query, chunks = Passage((5, 6, 7), 40), [Passage((5, 6, 9), 0), Passage((8, 9, 7), 4)]
    found = hybrid.embed_chunks(chunks) @ hybrid.embed_queries([query])[0]
    each = [torch.tensor([*cosines(part, query, chunks, [0, 1]).values()]) for part in parts]
    torch.testing.assert_close(found, 2 * each[0] + 0.5 * each[1])
    assert hybrid.dim == sum(part.dim for part in parts)


def test_equal_ranks_and_equal_chunks_are_in_the_order_of_ids(bank_of_said):
    # 0 and 1 are alike; 2 and 3 have ranks 1 and 2 of the one retriever, 2 and 1 of the other.
    first = {0: [0.0, 1], 1: [0.0, 1], 2: [1.0, 0], 3: [1.0, 1], 9: [1.0, 0]}
    second = first | {2: first[3], 3: first[2]}
    assert bank_of_said([first, second], 4) == [2, 3, 0, 1]
    assert bank_of_said([first, second, first], 4) == [2, 3, 0, 1]
    assert bank_of_said([first, second, second], 1) == [3]


def test_ranks_are_worth_the_same_whichever_retriever_gave_them():
    # Chunks 0, 1 and 2 have the ranks 1, 2 and 3, each of another retriever; 3, 4 and 5 the next three; and so on.
    ranks = [[place // 3 * 3 + (place + turn) % 3 for place in range(60)] for turn in range(3)]
    hybrid = HybridRetriever(
        [Said(dict(enumerate([[math.cos(r / 60), math.sin(r / 60)] for r in row]))) for row in ranks]
    )
    embeddings = hybrid.embed_chunks([Passage((1,), place) for place in range(60)])
    query, nothing = torch.tensor([1.0, 0] * 3), torch.zeros(60)
    found = Candidates(Passage((1,), 60), query, torch.arange(60), nothing, embeddings, nothing)
    scores = hybrid.rerank(found)
    assert scores.reshape(20, 3).diff(dim=1).eq(0).all()
    assert scores.sort(descending=True, stable=True).indices.tolist() == [*range(60)]


@pytest.fixture
def bank_of_said(small):
    def ranked(said, k):
        hybrid = HybridRetriever([Said(each) for each in said])
        bank = Registry().create_bank("torch", hybrid.dim, metric=hybrid.metric)
        blocks = torch.zeros(4, 1, 1, 1, 1)
        chunks = [Passage((1,), start) for start in range(4)]
        bank.add(hybrid.embed_chunks(chunks), blocks, blocks, [(start, start + 1) for start in range(4)])
        query = Passage((1,), 9)
        return Reranking(hybrid, query).best(bank, hybrid.embed_queries([query])[0], k)[0].tolist()

    return ranked


def test_a_layer_below_is_ranked_with_the_top(llama, small, text, backend):
    config = small(backend=backend, retriever="hybrid", retriever_options=PARTS)
    below, above = text(90, seed=1), text(90, seed=2)
    with MemoryDecoder(llama, None, config) as decoder:
        decoder.read(below)
        (base,) = decoder.banks
    with MemoryDecoder(llama, None, config) as decoder:
        decoder.reset(bases=[base])
        decoder.read(above)
        (bank,) = decoder.banks
        (stream,) = decoder._streams.batch.streams
        stream.retrieve(decoder.retriever.embed_queries([stream.query()])[0], decoder.retriever)
        layers = bank.layer_of(bank.ids)
        chunks = [
            *chunk_passages(below[0], *bank.spans_of(bank.ids[layers == 0]).tolist()),
            *chunk_passages(above[0], *bank.spans_of(bank.ids[layers == 1]).tolist()),
        ]
        rankings = [
            cosines(part, stream.query(), chunks, bank.ids.tolist()) for part in decoder.retriever._retrievers
        ]
    assert isinstance(bank, LayeredBank)
    assert stream.retrieval.ids.tolist() == fused(rankings)[0][:3]


def test_while_text_is_generated_each_retriever_has_its_own_focus(llama):
    parts = [create_retriever("lm", llama, None, {"dim": 64}), create_retriever("random", llama, None)]
    hybrid = HybridRetriever(parts)
    means, query = torch.randn(1, hybrid.dim), [Passage((5, 6, 7), 40, half_life=2)]
    halves = means.split([each.dim for each in parts], dim=1)
    expected = [
        torch.nn.functional.normalize(each.embed_focus(query, mean, [9]), dim=1)
        for each, mean in zip(parts, halves, strict=True)
    ]
    torch.testing.assert_close(hybrid.embed_focus(query, means, [9]), torch.cat(expected, dim=1))
    # One that has nothing left asks as it is, as it would alone.
    alone = parts[1].embed_queries([Passage((6, 7), 41)])
    only = torch.cat([means[:, : parts[0].dim], alone], dim=1)
    expected[1] = torch.nn.functional.normalize(alone, dim=1)
    torch.testing.assert_close(hybrid.embed_focus(query, only, [9]), torch.cat(expected, dim=1))


def test_beams_and_rows_generate_with_it(llama, small, text):
    config = small(
        retriever="hybrid", retriever_options=PARTS, retrieve_every=2, retrieve_for="answers", focus_tokens=3
    )
    with MemoryDecoder(llama, None, config) as decoder:
        decoder.read(text(80, rows=2))
        found = decoder.generate(text(30, rows=2), max_new_tokens=12, num_beams=2, do_sample=False)
    assert found.shape[0] == 2


def test_a_saved_memory_continues_with_other_weights_but_not_with_other_retrievers(
    llama, small, text, tmp_path
):
    def config(**changes):
        return small(retriever="hybrid", retriever_options=PARTS | changes)

    tokens = text(120)
    with MemoryDecoder(llama, None, config()) as decoder:
        decoder.read(tokens)
        decoder.save(tmp_path)
        expected = decoder.read(text(40, seed=3))
    with MemoryDecoder.load(tmp_path, llama, None, config()) as decoder:
        assert torch.equal(decoder.read(text(40, seed=3)), expected)
    assert MemoryDecoder.load(tmp_path, llama, None, config(weights="3,1", candidates=20))
    for changes in ({"retrievers": "random,lm"}, {"lm.sharpness": 2}, {"random.seed": 1}, {"lm.dim": 65}):
        with pytest.raises(SnapshotError, match=f"differs: retriever.*{next(iter(changes.values()))}.* now"):
            MemoryDecoder.load(tmp_path, llama, None, config(**changes))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"retrievers": "lm"}, InvalidArgumentError, TWO),
        ({"retrievers": "lm,lm"}, InvalidArgumentError, TWO),
        ({"retrievers": "lm,random,"}, InvalidArgumentError, TWO),
        ({"retrievers": ["lm", "random"]}, InvalidArgumentError, TWO),
        ({"retrievers": "lm,word"}, UnknownNameError, "There is no retriever 'word'"),
        ({"retrievers": "lm,hybrid"}, InvalidArgumentError, "retrievers must not hold 'hybrid'"),
        (
            {"retrievers": "lm,acme/model"},
            InvalidArgumentError,
            "option sentence-transformers.name to 'acme/model'",
        ),
        ({"retrievers": "lm,recent"}, InvalidArgumentError, "must compare by cosine, got RecentRetriever"),
        ({"weights": "1"}, InvalidArgumentError, "weights must be 2 numbers from 0.001 to 1000"),
        ({"weights": "1,0"}, InvalidArgumentError, "weights must be 2 numbers"),
        ({"weights": "1,nan"}, InvalidArgumentError, "weights must be 2 numbers"),
        ({"weights": "1,much"}, InvalidArgumentError, "weights must be text with a number for each"),
        ({"weights": [1, 2]}, InvalidArgumentError, "weights must be text with a number for each"),
        ({"candidates": 0}, InvalidArgumentError, "candidates must be an integer from 1|at least 1"),
        ({"dim": 8}, InvalidArgumentError, "There is no option 'dim' of retriever 'hybrid'"),
        ({"recent.dim": 8}, InvalidArgumentError, r"'recent.dim'.*, such as 'lm\.dim'"),
        ({"lm.sharp": 8}, InvalidArgumentError, "no option 'sharp' of retriever 'lm'"),
    ],
)
def test_what_cannot_be_fused_is_named(llama, options, kind, message):
    with pytest.raises(kind, match=message):
        create_retriever("hybrid", llama, Words(), {"retrievers": "lm,random", **options})


def test_retrievers_that_rerank_or_are_for_other_models_are_not_fused(llama, tiny_model):
    lm = create_retriever("lm", llama, None)
    with pytest.raises(InvalidArgumentError, match="must not re-rank themselves, as Choosy does"):
        HybridRetriever([lm, Choosy()])
    with pytest.raises(InvalidArgumentError, match="must be for one model, got 2"):
        HybridRetriever([lm, RandomRetriever(tiny_model(), None)])
    with pytest.raises(InvalidArgumentError, match="must be two or more, got 1"):
        HybridRetriever([lm])


def test_a_trained_decoders_folder_may_set_what_it_may_of_each_retriever(tiny_model, small, tmp_path):
    config = small(retriever="hybrid", retriever_options=PARTS | {"weights": "1,2"})
    MemoryDecoder(tiny_model(), None, config).save_pretrained(tmp_path)
    loaded = MemoryDecoder.from_pretrained(tmp_path, tiny_model(), None).config.retriever_options
    assert loaded == config.retriever_options
    said = (tmp_path / "memlong.json").read_text()
    for ours, theirs, words in (
        ('"random.dim": 32', '"random.dim": 1000000', "more than a file may ask for"),
        ('"lm,random"', '"lm,random,//host/share"', "must be names of retrievers"),
        ('"lm,random"', '"lm,random,stranger"', "There is no retriever 'stranger'"),
        ('"random.dim": 32', '"random.name": "x"', "names the option 'random.name'"),
    ):
        assert ours in said
        (tmp_path / "memlong.json").write_text(said.replace(ours, theirs))
        with pytest.raises((InvalidArgumentError, UnknownNameError), match=words):
            MemoryDecoder.from_pretrained(tmp_path, tiny_model(), None)


def test_a_retriever_chooses_among_candidates(llama, small, text, backend):
    retriever = Choosy()
    with MemoryDecoder(llama, None, small(backend=backend), retriever=retriever) as decoder:
        tokens = text(160)
        segments = list(decoder.stream(tokens))
        (bank,) = decoder.banks
        assert len(bank) > 30
        counts = bank.usage.retrievals.sum()
    retrieved = [each.retrievals[0] for each in segments if each.retrievals[0] is not None]
    assert len(retrieved) == len(retriever.seen) > 10
    for found, retrieval in zip(retriever.seen, retrieved, strict=True):
        assert len(found) == min(6, len(found.ids))
        assert (found.ids.diff() > 0).all()
        starts = found.spans[:, 0].tolist()
        assert found.query.token_ids == tuple(tokens[0, found.query.start : found.query.end].tolist())
        torch.testing.assert_close(found.query_embedding, retriever.embed_queries([found.query])[0])
        made = retriever.embed_chunks([Passage((1,), start) for start in starts])
        torch.testing.assert_close(found.embeddings, torch.nn.functional.normalize(made, dim=1))
        chosen = sorted((start for start in starts if (start - 2) % 8 == 0), reverse=True)[:3]
        assert retrieval.scores.tolist() == chosen
        assert retrieval.ids.tolist() == [
            each for start in chosen for each in found.ids[found.spans[:, 0] == start].tolist()
        ]
    assert counts == sum(len(each.ids) for each in retrieved)


def test_an_answer_chooses_among_fewer_candidates_with_a_cutoff(llama, small, text):
    retriever = Choosy(made=torch.zeros_like)
    with MemoryDecoder(llama, None, small(answer_cutoff=1.0), retriever=retriever) as decoder:
        decoder.read(text(160))
        assert len(retriever.seen[-1]) == 6
        forks, _ = ask(decoder._streams.batch, decoder.config)
    assert len(retriever.seen[-1]) == len(forks.streams[0].retrieval.ids) == 1


def test_what_is_retrieved_is_attended_to(llama, small, text):
    tokens = text(100)
    for made, same in ((lambda scores: torch.full_like(scores, -torch.inf), True), (None, False)):
        retriever = Choosy(made=made)
        with MemoryDecoder(llama, None, small(), retriever=retriever) as decoder:
            logits = decoder.read(tokens)
            (stream,) = decoder._streams.batch.streams
            assert (stream.memory is None) == same
            if not same:
                assert stream.memory.ids == tuple(sorted(stream.retrieval.ids.tolist()))
        with MemoryDecoder(llama, None, small(backend=None)) as decoder:
            assert torch.equal(decoder.read(tokens), logits) == same


@pytest.mark.parametrize(
    "made", [lambda scores: scores[1:], lambda scores: scores * torch.nan, lambda _: torch.tensor(1.0)]
)
def test_anything_but_a_score_for_each_candidate_is_refused(llama, small, text, made):
    with (
        MemoryDecoder(llama, None, small(), retriever=Choosy(made=made)) as decoder,
        pytest.raises(InvalidArgumentError, match="rerank of Choosy must return a number for each of"),
    ):
        decoder.read(text(100))


def test_fewer_candidates_than_are_retrieved_are_that_many(llama, small, text):
    retriever = Choosy(made=torch.zeros_like)
    with MemoryDecoder(llama, None, small(top_k=9), retriever=retriever) as decoder:
        decoder.read(text(160))
        (stream,) = decoder._streams.batch.streams
    assert [len(retriever.seen[-1]), len(stream.retrieval.ids)] == [9, 9]
    assert stream.retrieval.ids.tolist() == retriever.seen[-1].ids.tolist()  # equal scores


def test_a_chunk_that_leaves_between_search_and_choice_is_no_candidate():
    retriever, blocks = Choosy(), torch.zeros(4, 1, 1, 4, 1)
    bank = Registry().create_bank("torch", retriever.dim)
    bank.add(torch.eye(4, 8), blocks, blocks, [(2 + 8 * number, 6 + 8 * number) for number in range(4)])
    search = bank.search

    def search_and_remove(*args):
        found = search(*args)
        bank.remove([3])
        return found

    bank.search = search_and_remove
    query = Passage((1,), 99)
    ids, _ = Reranking(retriever, query).best(bank, retriever.embed_queries([query])[0], 2)
    assert retriever.seen[0].ids.tolist() == [0, 1, 2]
    assert ids.tolist() == [2, 1]


def test_a_cutoff_leaves_fewer_candidates():
    retriever, blocks = Choosy(), torch.zeros(4, 1, 1, 4, 1)
    bank = Registry().create_bank("torch", retriever.dim)
    bank.add(torch.eye(4, 8), blocks, blocks, [(2 + 8 * number, 6 + 8 * number) for number in range(4)])
    query = torch.tensor([0.3, 0, 1.0, 0.5, 0, 0, 0, 0])
    found = [
        Reranking(retriever, Passage((1,), 99)).best(bank, query, 2, cutoff)[0] for cutoff in (0, 0.4, 0.6)
    ]
    assert [each.ids.tolist() for each in retriever.seen] == [[0, 1, 2, 3], [2, 3], [2]]
    assert [each.tolist() for each in found] == [[3, 2], [3, 2], [2]]


def test_where_nothing_may_be_found_there_is_nothing_to_choose_from():
    retriever, blocks = Choosy(), torch.zeros(4, 1, 1, 4, 1)
    base, top = (Registry().create_bank("torch", retriever.dim) for _ in range(2))
    base.add(torch.eye(4, 8), blocks, blocks, [(2 + 8 * number, 6 + 8 * number) for number in range(4)])
    query = Passage((1,), 99)
    for among, found in (([[]], []), ([[1, 3]], [3, 1])):
        bank = LayeredBank(top, [base], among=among)
        ids, scores = Reranking(retriever, query).best(bank, retriever.embed_queries([query])[0], 2)
        assert ids.tolist() == found
        assert len(scores) == len(retriever.seen) * 2


def test_the_hook_alone_changes_nothing(llama, small, text):
    class Same(RandomRetriever):
        candidates = 3

    tokens, found = text(120), []
    for kind in (RandomRetriever, Same):
        with MemoryDecoder(llama, None, small(), retriever=kind(llama, None)) as decoder:
            found.append([each.retrievals[0] for each in decoder.stream(tokens)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert torch.equal(ours.ids, theirs.ids)
            assert torch.equal(ours.scores, theirs.scores)
