"""A segment's loss is the plain formula over tokens that have a successor, and nothing in it waits for a device."""

from __future__ import annotations

from math import exp

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from memlong.decoder import Segment
from memlong.evaluation import long_range_tokens
from memlong.training import TrainingConfig
from memlong.training.documents import Episode
from memlong.training.loss import Batch, segment_loss, tokens_between
from memlong.training.teacher import Lesson

SIZE = 8
DISTANCE = 3
WAITS = (
    "aten::nonzero",
    "aten::_local_scalar_dense",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
)


class Waits(TorchDispatchMode):
    """Keeps the names of operations whose result the host has to know before it can go on."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name
        by_mask = name.startswith(("aten::index", "aten::_index_put")) and any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool
            for each in (args[1] if isinstance(args[1], list | tuple) else [])
        )
        if name in WAITS or by_mask:
            self.found.append(name)
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def episodes(text):
    """Of 21, 17 and 3 tokens: the last segments have a token that nothing follows, padding, or nothing at all."""
    return [text(length, seed=length)[0].fmod(11) for length in (21, 17, 3)]


def segment_of(episodes, number, dtype=torch.float32):
    """Rows that are padded on the left, as a decoder gives them, with random logits of 11 tokens."""
    parts = [torch.arange(len(each))[number * SIZE : (number + 1) * SIZE] for each in episodes]
    width = max(map(len, parts))
    tokens = torch.full((len(parts), width), -1)
    for row, part in enumerate(parts):
        tokens[row, width - len(part) :] = part
    generator = torch.Generator().manual_seed(number)
    logits = torch.randn(*tokens.shape, 11, generator=generator).to(dtype).requires_grad_()
    return Segment(torch.zeros_like(tokens), tokens, logits, (None,) * len(parts))


def plainly(segment, episodes, weight):
    """Mean and sums, token by token."""
    losses, weights = [], []
    for row, ids in enumerate(episodes):
        distant = long_range_tokens(ids.tolist(), DISTANCE)
        for column, token in enumerate(segment.tokens[row].tolist()):
            if 0 <= token < len(ids) - 1:
                losses.append(cross_entropy(segment.logits[row, column].float(), ids[token + 1]))
                weights.append(1.0 + weight * float(distant[token + 1]))
    losses, weights = torch.stack(losses), torch.tensor(weights)
    far = weights > 1
    exact = losses.detach()
    sums = torch.stack([exact.sum(), torch.tensor(float(len(exact))), exact[far].sum(), far.sum()])
    return (losses * weights).sum() / weights.sum(), sums


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_losses_and_gradients_are_those_of_the_plain_formula(episodes, number, weight):
    batch = Batch.of([Episode(each) for each in episodes], DISTANCE, torch.device("cpu"))
    segment = segment_of(episodes, number)
    expected, sums = plainly(segment, episodes, weight)
    found = segment_loss(segment, batch, TrainingConfig(long_range_weight=weight))
    torch.testing.assert_close(found.mean, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.sums[:4].float(), sums, rtol=1e-6, atol=1e-6)
    ((wanted,), (given,)) = (torch.autograd.grad(each, segment.logits) for each in (expected, found.mean))
    torch.testing.assert_close(given, wanted, rtol=1e-6, atol=1e-6)
    assert given.abs().sum() > 0


@pytest.mark.parametrize("number", [0, 1])
def test_foreign_chunks_lessons_and_answers_weigh_as_in_the_plain_formula(episodes, number):
    """The second row is trained on some answers alone; full attention is better at some tokens, and worse at others."""
    generator = torch.Generator().manual_seed(7)
    weights = torch.randint(2, (len(episodes[1]),), generator=generator) * 10.0
    given = [Episode(episodes[0]), Episode(episodes[1], weights), Episode(episodes[2])]
    batch = Batch.of(given, DISTANCE, torch.device("cpu"))
    segment = segment_of(episodes, number)
    config = TrainingConfig(long_range_weight=0.5, contrast=2.0, distill=0.25)
    longest = batch.input_ids.shape[1]
    theirs = torch.randn(3, longest, 11, generator=generator).log_softmax(-1)
    best = theirs.topk(11)
    taught = 4 * torch.rand(3, longest, generator=generator)
    foreign = 4 * torch.rand(segment.tokens.shape, generator=generator)
    found = segment_loss(
        segment, batch, config, foreign=foreign, lesson=Lesson(best.indices, best.values, taught)
    )
    total, all_weights, contrasted, kinds = 0.0, 0.0, [0.0, 0.0, 0], set()
    for row, ids in enumerate(episodes):
        distant = long_range_tokens(ids.tolist(), DISTANCE)
        for column, token in enumerate(segment.tokens[row].tolist()):
            if not 0 <= token < len(ids) - 1:
                continue
            own = 1.0 if given[row].weights is None else float(given[row].weights[token + 1])
            if own == 0:
                continue
            ours = segment.logits[row, column].float()
            loss = cross_entropy(ours, ids[token + 1])
            gain = float(foreign[row, column] - loss.detach())
            weight = own * (1 + 0.5 * float(distant[token + 1])) * min(2.0, exp(gain))
            contrasted = [contrasted[0] + gain, contrasted[1] + float(loss.detach()), contrasted[2] + 1]
            needs = row == 1 or float(taught[row, token]) + 0.5 < float(loss.detach())
            if needs:
                away = (theirs[row, token].exp() * (theirs[row, token] - ours.log_softmax(-1))).sum()
                loss = 0.75 * loss + 0.25 * away
            kinds.add((row == 1, needs, exp(gain) > 2))
            total, all_weights = total + weight * loss, all_weights + weight
    if number == 0:
        assert len(kinds) >= 5
    torch.testing.assert_close(found.mean, total / all_weights, rtol=1e-5, atol=1e-5)
    assert float(found.weight) == pytest.approx(all_weights, rel=1e-5)
    _, count, _, _, foreign_sum, own_sum, tried = found.sums.tolist()
    assert [foreign_sum - own_sum, own_sum, tried] == pytest.approx(contrasted, rel=1e-5)
    assert count == tried


def test_weights_below_one_still_make_a_mean():
    episode = Episode(torch.arange(9), torch.full((9,), 0.01))
    batch = Batch.of([episode], DISTANCE, torch.device("cpu"))
    segment = segment_of([episode.tokens], 0)
    found = segment_loss(segment, batch, TrainingConfig())
    assert float(found.mean.detach()) == pytest.approx(float(found.sums[0] / found.sums[1]), rel=1e-5)


def test_logits_of_padding_count_for_nothing(episodes):
    batch = Batch.of([Episode(each) for each in episodes], DISTANCE, torch.device("cpu"))
    segment = segment_of(episodes, 1)
    before = segment_loss(segment, batch, TrainingConfig(long_range_weight=1.0))
    with torch.no_grad():
        segment.logits[segment.tokens < 0] += 100.0
    after = segment_loss(segment, batch, TrainingConfig(long_range_weight=1.0))
    assert (segment.tokens < 0).any()
    assert torch.equal(before.mean, after.mean)
    assert torch.equal(before.sums, after.sums)


def test_a_last_token_alone_costs_nothing():
    episodes = [torch.arange(9)]
    batch = Batch.of([Episode(each) for each in episodes], DISTANCE, torch.device("cpu"))
    segment = segment_of(episodes, 1)
    loss = segment_loss(segment, batch, TrainingConfig(long_range_weight=1.0))
    (gradient,) = torch.autograd.grad(loss.mean, segment.logits)
    assert segment.tokens.tolist() == [[8]]
    assert loss.mean == 0
    assert not loss.sums.any()
    assert not gradient.any()


def test_tokens_are_counted_without_a_look_at_the_device(episodes):
    batch = Batch.of([Episode(each) for each in episodes], DISTANCE, torch.device("cpu"))
    counts = [tokens_between(batch.lengths, start, start + SIZE) for start in range(0, 24, SIZE)]
    assert counts == [int((segment_of(episodes, number).tokens >= 0).sum()) for number in range(3)]


def test_the_host_waits_for_nothing(episodes):
    batch = Batch.of([Episode(each) for each in episodes], DISTANCE, torch.device("cpu"))
    segment = segment_of(episodes, 1, torch.bfloat16)
    with Waits() as waits:
        segment_loss(segment, batch, TrainingConfig(long_range_weight=1.0)).mean.backward()
    assert waits.found == []
    with Waits() as waits:  # and if it did, this would see it
        segment.logits[segment.tokens >= 0].sum().backward()
        bool((segment.tokens >= 0).any())
    assert len(waits.found) >= 3
