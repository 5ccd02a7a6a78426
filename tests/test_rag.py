"""RAG as text, the alternative of the benches: a memory's chunks, read again."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from memlong import MemoryDecoder
from memlong.decoder.stream.asking import ask
from memlong.evaluation import evaluate_perplexity


@pytest.fixture
def rag(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    return importlib.import_module("systems.rag").RagAsText


@pytest.mark.parametrize("overlap", [0, 3])
def test_a_prompt_holds_the_chunks_that_a_memory_retrieves(llama, small, text, rag, overlap):
    config, ids = small(embedding_overlap=overlap), text(100)
    other = rag(llama, None, config)
    other.read(ids)
    with MemoryDecoder(llama, None, config) as decoder:
        for segment in decoder.stream(ids):
            begin, (retrieval,) = int(segment.tokens[0, 0]), segment.retrievals
            if retrieval is None:
                continue
            spans = decoder.banks[0].spans_of(retrieval.ids.sort().values)
            chunks = [token for start, end in spans.tolist() for token in ids[0, start:end].tolist()]
            prompt = other.prompt(begin, begin, other._query(begin, config.query_length))
            assert prompt[: len(chunks) + 2] == ids[0, :2].tolist() + chunks
            assert (
                prompt[len(chunks) + 2 :] == ids[0, begin - (len(prompt) - len(chunks) - 2) : begin].tolist()
            )
            assert len(prompt) <= 2 + len(chunks) + config.window_past


def test_with_all_chunks_it_is_full_attention(llama, small, text, rag):
    ids = text(100)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(llama(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    found = evaluate_perplexity(rag(llama, None, small(top_k=99)), ids)
    torch.testing.assert_close(torch.from_numpy(found.token_nll).float(), expected, atol=1e-4, rtol=1e-4)


def test_a_question_is_answered_with_what_its_end_retrieves(llama, small, text, rag):
    ids, answers = text(110), [[4, 5, 6], [7]]
    decoder = rag(llama, None, small(focus_tokens=3))
    decoder.read(ids[:, :100])
    options = {"max_new_tokens": 5, "do_sample": False}
    said = decoder.generate(ids[:, 100:], remember=False, **options)
    assert torch.equal(said[:, :10], ids[:, 100:])
    for likelihood, answer in zip(decoder.score(ids[:, 100:], answers), answers, strict=True):
        assert likelihood.tokens.shape == (len(answer),)
    (likely,) = decoder.score(ids[:, 100:], [said[0, 10:].tolist()])
    assert likely.is_greedy.all()
    assert torch.equal(decoder.generate(ids[:, 100:], **options), said)


@pytest.mark.parametrize("tokens", [*range(20, 70, 7), 110])
@pytest.mark.parametrize(("focus", "cutoff"), [(0, 0.0), (3, 0.0), (3, 0.8), (3, 1.0)])
def test_a_questions_prompt_is_what_a_memory_attends_to(llama, small, text, rag, tokens, focus, cutoff):
    config, ids = small(focus_tokens=focus, answer_cutoff=cutoff), text(tokens)
    with MemoryDecoder(llama, None, config) as decoder:
        decoder.read(ids)
        forks, _ = ask(decoder._streams.batch, config)
        (stream,) = forks.streams
        memory = [] if stream.memory is None else stream.memory.spans.tolist()
        window = ids[0, stream.first_token :].tolist()
    chunks = [token for start, end in memory for token in ids[0, start:end].tolist()]
    assert rag(llama, None, config).asked(ids[0].tolist()) == ids[0, :2].tolist() + chunks + window


def test_long_prompts_do_not_know_of_each_other(llama, small, text, rag):
    ids, config = text(40), small()
    one, other = (text(60, seed=seed)[0].tolist() for seed in (1, 2))
    decoder, fresh = rag(llama, None, config), rag(llama, None, config)
    for each in (decoder, fresh):
        each.read(ids)
    decoder.asked(one)
    assert decoder.asked(other) == fresh.asked(other)
    torch.testing.assert_close(decoder._embeddings, fresh._embeddings)
