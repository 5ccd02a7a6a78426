"""The built-in retrievers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from memlong.decoder import Passage, create_retriever
from memlong.decoder.retrievers.base import without_component
from memlong.decoder.retrievers.baselines import RandomRetriever
from memlong.decoder.retrievers.recency import RecencyPrior
from memlong.errors import InvalidArgumentError


class Words:
    """A tokenizer as far as retrievers need one."""

    def decode(self, token_ids):
        return " ".join(f"word{token}" for token in token_ids)


def passages(*starts):
    return [Passage(tuple(range(3 + start, 11 + start)), start) for start in starts]


@pytest.mark.parametrize("name", ["lm", "random", "recent"])
def test_an_embedding_depends_on_its_passage_alone(llama, name):
    retriever = create_retriever(name, llama, Words())
    together = retriever.embed_chunks(passages(0, 16, 40))
    assert together.shape == (3, retriever.dim)
    assert together.dtype == torch.float32
    for row, start in enumerate((0, 16, 40)):
        assert torch.equal(retriever.embed_chunks(passages(start))[0], together[row])


@pytest.mark.parametrize("half_life", [None, 2, 50])
@pytest.mark.parametrize("pairs", [0, 0.5])
def test_lm_sums_a_passage_token_by_token_and_then_bigram_by_bigram(llama, pairs, half_life):
    retriever = create_retriever("lm", llama, Words(), {"dim": 64, "pairs": pairs, "recency": 0})
    places, signs, weights = retriever._places, retriever._signs, retriever._weights
    texts = [(9, 4, 4, 7, 9, 4), (5,), (), (4, 9, *range(3, 97), 4, 9), (7, 4, 7, 4, 7)]
    lives = [half_life, half_life, half_life, half_life, None]
    expected = torch.zeros(len(texts), 64)
    for sketch, text, life in zip(expected, texts, lives, strict=True):
        decays = [0.5 ** (place / life if life else 0) for place in range(len(text))][::-1]
        for token in sorted(set(text)):
            decay = max(decay for other, decay in zip(text, decays, strict=True) if other == token)
            sketch.index_add_(0, places[token], decay * weights[token] * signs[token])
        for first, second in sorted(set(pairwise(text))) if pairs else ():
            weight = pairs * (weights[first] + weights[second])
            where = (places[first] + 3 * places[second] + 1) % 64
            pairs_of = zip(pairwise(text), decays[1:], strict=True)
            decay = max(decay for pair, decay in pairs_of if pair == (first, second))
            sketch.index_add_(0, where, decay * weight * (signs[first] * signs[second]))
    made = retriever.embed_chunks(
        [Passage(text, 0, half_life=life) for text, life in zip(texts, lives, strict=True)]
    )
    torch.testing.assert_close(made, expected, rtol=1e-5 if half_life else 0, atol=1e-5 if half_life else 0)


def test_the_latest_tokens_are_as_many_as_the_half_life():
    assert Passage((5, 6, 7, 8), 10, half_life=3).latest == Passage((6, 7, 8), 11)
    assert Passage((5, 6), 10, half_life=3).latest == Passage((5, 6), 10)
    assert Passage((5, 6), 10).latest == Passage((5, 6), 10)
    with pytest.raises(InvalidArgumentError, match="half_life must be at least 1, or None, got 0"):
        Passage((5, 6), 10, half_life=0)


def test_a_retriever_that_cannot_weigh_tokens_asks_with_the_latest(llama):
    retriever = RandomRetriever(llama, Words())
    mean = torch.zeros(1, retriever.dim)
    (query,) = passages(80)
    assert torch.equal(
        retriever.embed_focus([Passage(query.token_ids, query.start, half_life=3)], mean, [9]),
        retriever.embed_focus([Passage(query.token_ids[-3:], query.end - 3)], mean, [9]),
    )


def test_a_question_about_several_facts_finds_all_of_them(llama):
    """Names at the beginning of a question ask, too, but less than those at its end."""
    retriever = create_retriever("lm", llama, Words(), {"dim": 65_536})
    names = range(40, 60)
    chunks = retriever.embed_chunks([Passage((*range(3, 9), name), 20_000) for name in names])
    chunks = torch.nn.functional.normalize(chunks, dim=1)
    mean = chunks.mean(dim=0)[None]
    question = (41, 9, 10, 11, 57, 9, 10, 12)
    alike, scores = (
        chunks @ retriever.embed_focus([Passage(question, 0, half_life=life)], mean, [len(chunks)])[0]
        for life in (None, 16)
    )
    assert sorted(scores.topk(2).indices.tolist()) == [1, 17]
    for name, distance in ((1, 7), (17, 3)):
        assert scores[name] / alike[name] == pytest.approx(0.5 ** (distance / 16), rel=0.1)


def test_lm_finds_the_passage_that_shares_its_words(llama):
    retriever = create_retriever("lm", llama, Words())
    chunks = retriever.embed_chunks(passages(0, 20, 40, 60))
    query = retriever.embed_queries(passages(42))
    scores = torch.nn.functional.cosine_similarity(query, chunks)
    assert int(scores.argmax()) == 2


def lm_score(retriever, query, chunk):
    """Of one query for one chunk."""
    pair = retriever.embed_queries([Passage(query, 0)]), retriever.embed_chunks([Passage(chunk, 0)])
    return float(torch.nn.functional.cosine_similarity(*pair))


def test_lm_tells_passages_of_the_same_tokens_apart_by_their_order(llama):
    there, back = (5, 6, 7, 8, 9, 10), (10, 9, 8, 7, 6, 5)
    retriever = create_retriever("lm", llama, Words(), {"pairs": 0.5, "dim": 4096, "recency": 0})
    assert lm_score(retriever, there, there) == pytest.approx(1)
    assert lm_score(retriever, there, back) < 0.8
    without = create_retriever("lm", llama, Words(), {"pairs": 0, "recency": 0})
    assert lm_score(without, there, back) == pytest.approx(1)


def test_lm_embeds_a_single_token(llama):
    retriever = create_retriever("lm", llama, Words(), {"pairs": 0.5})
    assert lm_score(retriever, (5,), (5,)) == pytest.approx(1)


def test_lm_weighs_a_token_by_what_it_tells_the_model(llama):
    retriever = create_retriever("lm", llama, Words(), {"sharpness": 2, "pairs": 0})
    with torch.no_grad():
        chances = llama(torch.tensor([[llama.config.bos_token_id or 0]])).logits[0, -1]
    likely, rare = (int(token) for token in (chances.argmax(), chances.argmin()))
    assert lm_score(retriever, (likely, rare), (rare,)) > lm_score(retriever, (likely, rare), (likely,))


def test_lm_prefers_the_later_of_two_passages_of_the_same_tokens(llama):
    earlier, later, query = (Passage((5, 6, 7), start) for start in (0, 4000, 9000))
    for recency, same in ((0.3, False), (0, True)):
        retriever = create_retriever("lm", llama, Words(), {"recency": recency})
        scores = retriever.embed_queries([query]) @ retriever.embed_chunks([earlier, later]).T
        assert torch.equal(scores[0, 0], scores[0, 1]) == same
        assert scores[0, 1] >= scores[0, 0]


@pytest.mark.parametrize("query", [20_000, 1_500_000])
def test_the_recency_prior_is_a_gaussian_of_the_distance(query):
    prior = RecencyPrior(0.3, 6000)
    distances = torch.arange(0, min(query, 220 * 6000), 64)
    chunks = [Passage((1,), query - int(distance)) for distance in distances]
    places = [prior.extend(torch.ones(len(some), 1), some) for some in (chunks, [Passage((1,), query)])]
    assert places[0].shape == (len(chunks), 1 + prior.width)
    gains = places[0] @ places[1][0] - 1
    expected = 0.3 * (-(distances / 6000).square() / 2).exp()
    torch.testing.assert_close(gains, expected, rtol=0, atol=3e-4)


def test_lm_focuses_on_what_chunks_do_not_share(llama):
    """A question at the end of text that all chunks repeat."""
    retriever = create_retriever("lm", llama, Words())
    common, key = tuple(range(3, 40)), (50, 51, 52)
    chunks = retriever.embed_chunks(
        [Passage((*common, *key), 0), *(Passage(common, 20_000 + 40 * n) for n in range(1, 99))]
    )
    query = [Passage((*common[-9:], *key), 24_000)]
    chunks = torch.nn.functional.normalize(chunks, dim=1)
    assert int((chunks @ retriever.embed_queries(query)[0]).argmax()) != 0
    scores = chunks @ retriever.embed_focus(query, chunks.mean(dim=0)[None], [len(chunks)])[0]
    assert int(scores.argmax()) == 0
    assert scores[1:].abs().max() < 0.2 * scores[0]


def test_lm_focuses_on_what_few_chunks_hold(llama):
    """A fact among others of the same wording: what tells it apart is one name."""
    retriever = create_retriever("lm", llama, Words())
    wording, names = tuple(range(3, 19)), range(30, 46)
    text = torch.randint(50, 97, (len(names), 12), generator=torch.Generator().manual_seed(0)).tolist()
    # The one that is asked for shares less of the wording than others do.
    facts = [
        (*(wording[-9:] if name == 37 else wording), name, *more)
        for name, more in zip(names, text, strict=True)
    ]
    chunks = retriever.embed_chunks([Passage(fact, 20_000) for fact in facts])
    chunks = torch.nn.functional.normalize(chunks, dim=1)
    query = [Passage((*wording, 37), 24_000)]
    asked = retriever.embed_focus(query, chunks.mean(dim=0)[None], [len(chunks)])[0]
    assert int((chunks @ retriever.embed_queries(query)[0]).argmax()) != names.index(37)
    assert int((chunks @ asked).argmax()) == names.index(37)


@pytest.mark.parametrize("sharpness", [0, 0.5, 1, 2, 3, 4])
def test_what_all_chunks_hold_hardly_counts(llama, sharpness):
    with torch.no_grad():
        llama.lm_head.weight.mul_(30)  # surprisals from nearly 0 to many nats
    options = {"sharpness": sharpness, "pairs": 0, "recency": 0, "dim": 256}
    retriever = create_retriever("lm", llama, Words(), options)
    common, *others = retriever._weights.argsort(descending=True)[:51].tolist()
    chunks = retriever.embed_chunks([Passage((common, other), 20_000) for other in others])
    mean = torch.nn.functional.normalize(chunks, dim=1).mean(dim=0)

    def counts(token):
        query = [Passage((token,), 24_000)]
        focus = retriever.embed_focus(query, mean[None], [len(chunks)])
        return float(focus.double().norm() / retriever.embed_queries(query).double().norm())

    assert counts(common) < 0.1 * counts(others[0])


def test_each_focus_is_that_of_its_own_bank(llama):
    retriever = create_retriever("lm", llama, Words())
    queries = [Passage(tuple(range(start, start + 9)), 200) for start in (3, 7, 11)]
    means = torch.nn.functional.normalize(
        torch.stack(
            [retriever.embed_chunks(passages(*range(start, 60, 4))).mean(dim=0) for start in (0, 1, 30)]
        )
    )
    together = retriever.embed_focus(queries, means, [15, 14, 8])
    for row, size in enumerate((15, 14, 8)):
        alone = retriever.embed_focus([queries[row]], means[row : row + 1], [size])
        torch.testing.assert_close(together[row], alone[0])


def test_of_few_chunks_a_focus_is_what_they_hold(llama):
    """What none of them holds weighs no more than what one does, and its chance similarity least of all."""
    retriever = create_retriever("lm", llama, Words())
    held, other = tuple(range(3, 11)), tuple(range(11, 19))
    chunks = torch.nn.functional.normalize(
        retriever.embed_chunks([Passage(held, 0), Passage(other, 8)]), dim=1
    )
    query = [Passage((*held[:2], *range(40, 60)), 16)]
    asked = retriever.embed_focus(query, chunks.mean(dim=0)[None], [2])[0]
    assert int((chunks @ asked).argmax()) == 0
    # Of one chunk, and of none, nothing is known: 0, so that the query asks as it is.
    assert not retriever.embed_focus(query, chunks[:1], [1]).any()
    assert not retriever.embed_focus(query, torch.zeros(1, retriever.dim), [0]).any()


def test_a_focus_loses_what_all_chunks_share_and_no_more():
    vectors, directions = torch.tensor([[3.0, 4], [3, 4], [1, 7]]), torch.tensor([[0.0, 2], [0, 0], [2, 14]])
    assert without_component(vectors, directions).tolist() == [[3, 0], [3, 4], [0, 0]]


def test_a_focus_of_distances_is_a_query(llama):
    class Far(RandomRetriever):
        metric = "l2"

    retriever = Far(llama, Words())
    focus = retriever.embed_focus(passages(80), torch.ones(1, retriever.dim), [1])
    assert torch.equal(focus, retriever.embed_queries(passages(80)))


@pytest.mark.parametrize("name", ["random", "recent"])
def test_controls_have_a_focus_of_the_same_kind(llama, name):
    retriever = create_retriever(name, llama, Words())
    chunks = retriever.embed_chunks(passages(*range(0, 64, 8)))
    focus = retriever.embed_focus(passages(80), chunks.mean(dim=0)[None], [len(chunks)])
    assert focus.shape == (1, retriever.dim)
    assert bool(focus.any()) == (name == "random")


def test_recent_prefers_the_latest(llama):
    retriever = create_retriever("recent", llama, Words())
    scores = retriever.embed_queries(passages(80)) @ retriever.embed_chunks(passages(0, 64, 32)).T
    assert scores.argsort(descending=True).tolist() == [[1, 2, 0]]


def test_random_reaches_every_chunk_and_follows_its_seed(llama):
    retriever = create_retriever("random", llama, Words(), {"seed": 1})
    chunks = retriever.embed_chunks(passages(*range(0, 64, 8)))
    best = (retriever.embed_queries(passages(*range(80))) @ chunks.T).argmax(dim=1)
    assert len(set(best.tolist())) == 8
    other = create_retriever("random", llama, Words(), {"seed": 2})
    assert not torch.equal(other.embed_chunks(passages(0)), chunks[:1])


def test_an_option_that_a_retriever_lacks_is_named(llama):
    with pytest.raises(InvalidArgumentError, match="no option 'sed' of retriever 'random'"):
        create_retriever("random", llama, Words(), {"sed": 1})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("random", {"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ("random", {"dim": 0}, "dim must be an integer of at least 1"),
        ("random", {"dim": 10**21}, "dim must be at most 65536, got 1000000000000000000000"),
        ("sentence-transformers", {"query_prompt": 5}, "query_prompt must be text, got 5"),
        ("sentence-transformers", {"chunk_prompt": None}, "chunk_prompt must be text, got None"),
        ("sentence-transformers", {"name": ["a"]}, r"name must be text, got \['a'\]"),
        ("sentence-transformers", {"device": 5}, "device must be text such as 'cpu', or None, got 5"),
        ("lm", {"sharpness": "high"}, "sharpness must be a number from 0 to 8, got 'high'"),
        ("lm", {"pairs": float("nan")}, "pairs must be a number from 0 to 8, got nan"),
        ("lm", {"recency": -1}, "recency must be a number from 0 to 8, got -1"),
        ("lm", {"recency_scale": 0.5}, "recency_scale must be an integer of at least 1, got 0.5"),
        ("lm", {"recency_scale": 10**400}, "recency_scale must be an integer from 1 to"),
        ("lm", {"dim": 10**21}, "dim must be an integer from 1 to 1048576"),
        ("sentence-transformers", {"piece_tokens": 0}, "piece_tokens must be an integer of at least 1"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(llama, name, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        create_retriever(name, llama, Words(), options)


def test_a_folder_that_holds_no_model_is_refused(llama, tmp_path):
    with pytest.raises(InvalidArgumentError, match="Cannot load the retriever"):
        create_retriever(str(tmp_path), llama, Words())


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A tiny random encoder that reads at most 14 words."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=200, max_position_embeddings=16, **sizes)).save_pretrained(folder)
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {f"word{number}": 2 + number for number in range(150)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_sentence_encoder_reads_the_whole_of_a_long_passage(llama, encoder_folder):
    retriever = create_retriever(encoder_folder, llama, Words(), {"piece_tokens": 10})
    words = tuple(range(30))
    whole, start, middle, end, changed = retriever.embed_queries(
        [
            Passage(words, 0),
            *(Passage(words[i : i + 10], i) for i in (0, 10, 20)),
            Passage((*words[:-1], 99), 0),
        ]
    )
    torch.testing.assert_close(whole, (start + middle + end) / 3)
    torch.testing.assert_close(start.norm(), torch.tensor(1.0))
    assert not torch.allclose(whole, changed)
    assert torch.equal(retriever.embed_chunks([Passage(words, 0)])[0], whole)


def test_a_sentence_encoder_loads_without_a_bar(llama, encoder_folder, capsys):
    create_retriever(encoder_folder, llama, Words())
    assert "Loading weights" not in capsys.readouterr().err


def test_the_language_models_weights_do_not_depend_on_its_mode(llama):
    llama.config.attention_dropout = 0.5
    for layer in llama.model.layers:
        layer.self_attn.attention_dropout = 0.5
    passage = Passage((5, 6, 7), 0)
    expected = create_retriever("lm", llama, None).embed_chunks([passage])
    llama.train()
    assert torch.equal(create_retriever("lm", llama, None).embed_chunks([passage]), expected)
    assert llama.training


@pytest.mark.parametrize("token", [97, -1, 2**40])
def test_a_beginning_outside_the_vocabulary_is_named(tiny_model, token):
    model = tiny_model()
    model.config.bos_token_id = token
    with pytest.raises(InvalidArgumentError, match=r"bos_token_id must be a token id from 0 to 96"):
        create_retriever("lm", model, None)
    model.config.bos_token_id = None
    assert create_retriever("lm", model, None).dim
