"""Every token of an episode but the first is scored once, whatever the rows beside it."""

from __future__ import annotations

import pytest
import torch

from memlong import MemoryDecoder
from memlong.evaluation import evaluate_perplexity
from memlong.training import TrainingConfig
from memlong.training.documents import Episode
from memlong.training.loss import Batch, segment_loss


@pytest.mark.parametrize("length", [40, 45, 49])
def test_the_losses_are_those_of_perplexity(llama, small, text, length):
    ids = text(length)
    short = text(23, seed=1)[0]
    with MemoryDecoder(llama, None, small()) as decoder:
        expected = evaluate_perplexity(decoder, ids, long_range_distance=5)
        beside = evaluate_perplexity(decoder, short[None], long_range_distance=5)
        decoder.reset()
        batch = Batch.of([Episode(each) for each in [ids[0], short]], 5, ids.device)
        found = [
            segment_loss(each, batch, TrainingConfig(long_range_weight=0.0))
            for each in decoder.stream(batch.input_ids, batch.mask)
        ]
    total, count, distant, distant_count, *_ = sum(each.sums for each in found if each).tolist()
    assert count == length - 1 + 22
    assert total == pytest.approx(expected.nll + beside.nll, rel=1e-5)
    assert distant_count == expected.long_range.sum() + beside.long_range.sum()
    both = [each.token_nll[each.long_range].sum() for each in (expected, beside)]
    assert distant == pytest.approx(sum(both), rel=1e-5)


def test_long_range_tokens_weigh_what_they_are_given(llama, small, text):
    ids = text(24)
    with MemoryDecoder(llama, None, small()) as decoder:
        batch = Batch.of([Episode(each) for each in [ids[0]]], 5, ids.device)
        *_, last = decoder.stream(batch.input_ids, batch.mask)
    even, weighted = (
        segment_loss(last, batch, TrainingConfig(long_range_weight=weight)) for weight in (0.0, 3.0)
    )
    total, count, distant, distant_count, *_ = even.sums.tolist()
    assert distant_count
    assert float(even.mean) == pytest.approx(total / count, rel=1e-5)
    assert float(weighted.mean) == pytest.approx(
        (total + 3 * distant) / (count + 3 * distant_count), rel=1e-5
    )
    assert torch.equal(even.sums, weighted.sums)
