"""Perplexity as the plain model gives it, and the tokens that count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memlong import MemoryDecoder
from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.evaluation import evaluate_perplexity, long_range_tokens, perplexity


def reference_nll(model, ids):
    with torch.no_grad():
        logits = model(ids).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").numpy()


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("score_from", [1, 7, 8, 9, 63])
def test_with_everything_retrieved_it_is_that_of_full_attention(
    llama, small, text, monkeypatch, score_from, rows
):
    monkeypatch.setattr(perplexity, "_AT_ONCE", rows * llama.config.vocab_size)
    ids = text(100)
    config = small(position_mode="original", top_k=64)
    with MemoryDecoder(llama, None, config) as decoder:
        result = evaluate_perplexity(decoder, ids, score_from=score_from)
    expected = reference_nll(llama, ids)[score_from - 1 :]
    np.testing.assert_allclose(result.token_nll, expected, atol=1e-4)
    assert result.perplexity == pytest.approx(np.exp(expected.mean()), rel=1e-4)
    assert result.nll == pytest.approx(expected.sum(), rel=1e-4)
    assert result.tokens == 100
    assert result.recall_at_k == 1.0


def test_all_systems_score_the_same_tokens(llama, small, text):
    ids = text(90)
    results = []
    for config in (small(), small(backend=None), small(local_window=48), small(segment_size=12)):
        with MemoryDecoder(llama, None, config) as decoder:
            results.append(evaluate_perplexity(decoder, ids, score_from=33, long_range_distance=24))
    assert {result.token_nll.size for result in results} == {57}
    expected = long_range_tokens(ids[0].tolist(), 24)[33:]
    assert all(np.array_equal(result.long_range, expected) for result in results)


def test_without_memory_there_is_no_recall_and_nothing_is_stored(llama, small, text):
    with MemoryDecoder(llama, None, small(backend=None)) as decoder:
        result = evaluate_perplexity(decoder, text(90))
    assert result.recall_at_k is None
    assert result.chunks_stored == 0


def test_memory_is_new_for_each_document(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        first = evaluate_perplexity(decoder, text(90))
        again = evaluate_perplexity(decoder, text(90))
    assert np.array_equal(first.token_nll, again.token_nll)
    assert first.chunks_stored == again.chunks_stored > 0


def test_progress_counts_every_token_once(llama, small, text):
    seen = []
    with MemoryDecoder(llama, None, small()) as decoder:
        evaluate_perplexity(decoder, text(45), progress=seen.append)
    assert sum(seen) == 45


def test_a_text_that_is_too_short_says_so(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        with pytest.raises(InvalidTextError, match=r"must have at least 8 tokens, one segment, got 5"):
            evaluate_perplexity(decoder, text(5))
        with pytest.raises(InvalidTextError, match="must have more than 40 tokens"):
            evaluate_perplexity(decoder, text(40), score_from=40)
        with pytest.raises(InvalidArgumentError, match="score_from must be at least 1"):
            evaluate_perplexity(decoder, text(40), score_from=0)
        with pytest.raises(InvalidArgumentError, match="must be one document"):
            evaluate_perplexity(decoder, text(40, rows=2))
