"""The loss of a segment: every next token is predicted, including the first one of the following segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from memlong.decoder import Segment
from memlong.evaluation import long_range_tokens
from memlong.training.config import TrainingConfig
from memlong.training.documents import Episode
from memlong.training.found import places_of
from memlong.training.teacher import Lesson

_MARGIN = 0.5  # nats that full attention must be better by for a token to need recall
_NOTHING = -100
"""Target of a token without a next token; `cross_entropy` ignores it."""


@dataclass(frozen=True)
class Piece:
    """A segment of all rows.

    Attributes
    ----------
    input_ids, mask
        [rows, tokens], int64, on the CPU.
    queries
        Of each row, the token ids to retrieve with; None for the text before.
    counted
        [rows, tokens], bool, on the CPU: whether the token that follows counts in the loss.
    start
        The first token's index in the row.
    """

    input_ids: Tensor
    mask: Tensor
    queries: tuple[Sequence[int] | None, ...]
    counted: Tensor
    start: int

    def until_answered(self) -> Piece:
        """Return each row's tokens up to the last whose next one counts; none of a row that asks nothing."""
        last = self.counted.flip(1).cumsum(dim=1).flip(1) > 0  # whether this or a later one counts
        width = int(last.any(dim=0).sum())
        each = (self.input_ids, self.mask * last, self.counted)
        input_ids, mask, counted = (some[:, :width] for some in each)
        return replace(self, input_ids=input_ids, mask=mask, counted=counted)

    def without_queries(self) -> Piece:
        """Return the same text, asked for nothing."""
        return replace(self, queries=(None,) * len(self.queries))


@dataclass(frozen=True)
class Batch:
    """A batch of episodes, padded on the right.

    Attributes
    ----------
    input_ids
        [rows, tokens], int64, on the CPU.
    lengths
        Tokens of each row.
    targets
        [rows, tokens], int64, on the model's device: the next token, or -100 if there is none.
    distant
        [rows, tokens], bool, on the model's device: whether the next token is long-range.
    weights
        [rows, tokens], float32, on the model's device: how much the loss of the next token counts.
    is_answer
        [rows, tokens], bool, on the model's device: whether the next token counts in an episode in which not all do.
    queries
        Of each row, what to retrieve with by the first token of a segment, as in `Episode`.
    counted
        [rows, tokens], bool, on the CPU: whether the token that follows counts in the loss.
    places
        [rows, tokens], int64, on the CPU: where the fact that the next token answers was told, as in `places_of`.
    """

    input_ids: Tensor
    lengths: tuple[int, ...]
    targets: Tensor
    distant: Tensor
    weights: Tensor
    is_answer: Tensor
    queries: tuple[Mapping[int, Sequence[int]], ...]
    counted: Tensor
    places: Tensor

    @classmethod
    def of(cls, episodes: Sequence[Episode], distance: int, device: torch.device) -> Self:
        """Batch episodes; tokens that last occurred more than ``distance`` tokens back are long-range."""
        tokens = [each.tokens.cpu() for each in episodes]
        marks = [torch.from_numpy(long_range_tokens(each.tolist(), distance)) for each in tokens]
        weights = [
            torch.ones(len(each.tokens)) if each.weights is None else each.weights for each in episodes
        ]
        following = [torch.cat([each[1:], each.new_tensor([_NOTHING])]) for each in tokens]
        distant, counting = (
            [torch.cat([each[1:], each.new_zeros(1)]) for each in some] for some in (marks, weights)
        )
        told = [places_of(each) for each in episodes]
        told = [torch.cat([each[1:], each.new_tensor([-1])]) for each in told]
        targets = pad_sequence(following, batch_first=True, padding_value=_NOTHING)
        counts = pad_sequence(counting, batch_first=True)
        is_answer = (counts > 0) & torch.tensor([[each.weights is not None] for each in episodes])
        return cls(
            pad_sequence(tokens, batch_first=True),
            tuple(map(len, tokens)),
            targets.to(device),
            pad_sequence(distant, batch_first=True).to(device),
            counts.to(device),
            is_answer.to(device),
            tuple(each.queries for each in episodes),
            (counts > 0) & (targets != _NOTHING),
            pad_sequence(told, batch_first=True, padding_value=-1),
        )

    @property
    def mask(self) -> Tensor:
        """Padding mask [rows, tokens], int64, on the CPU: 0 for padding."""
        places = torch.arange(self.input_ids.shape[1], device="cpu")
        return (places < torch.tensor(self.lengths, device="cpu")[:, None]).long()

    def piece(self, start: int, end: int) -> Piece:
        """Return the tokens of all rows with an index in [start, end)."""
        queries = tuple(each.get(start) for each in self.queries)
        here = slice(start, end)
        return Piece(self.input_ids[:, here], self.mask[:, here], queries, self.counted[:, here], start)

    def counts(self, start: int, end: int) -> bool:
        """Whether a token that follows one with an index in [start, end) counts in the loss."""
        return bool(self.counted[:, start:end].any())


def tokens_between(lengths: Sequence[int], start: int, end: int) -> int:
    """Count the tokens of rows of these lengths with an index in [start, end)."""
    return sum(max(0, min(length, end) - start) for length in lengths)


@dataclass(frozen=True)
class SegmentLoss:
    """The loss of a segment, on its device.

    Attributes
    ----------
    total
        Weighted sum of the tokens' negative log-likelihoods; 0 if no token counts.
    weight
        Sum of the weights, detached.
    sums
        [7], float64, detached: unweighted sum of the negative log-likelihood over all tokens that count, and their
        number; the same for long-range tokens; and where foreign chunks were tried, the sum with them, the sum without,
        and the number.
    """

    total: Tensor
    weight: Tensor
    sums: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> Self:
        """Return the loss of no token at all."""
        return cls(
            torch.zeros((), dtype=torch.float32, device=device),
            torch.zeros((), dtype=torch.float32, device=device),
            torch.zeros(7, dtype=torch.float64, device=device),
        )

    @property
    def mean(self) -> Tensor:
        """The training objective: weighted mean negative log-likelihood."""
        return self.share_of(self.weight)

    def share_of(self, weight: Tensor) -> Tensor:
        """Return what these rows add to the objective of more rows, whose weights have this sum."""
        return self.total / weight.clamp(min=torch.finfo(weight.dtype).tiny)  # 0 / 0 would be NaN


def token_losses(segment: Segment, batch: Batch) -> Tensor:
    """Return the negative log-likelihood [rows, tokens] of what follows each token of a segment; 0 without a target.

    Tokens without a target are masked to 0 rather than dropped: dropping would copy the logits and synchronize with the
    device to count what is left.
    """
    _, targets = _targets(segment, batch)
    logits = segment.logits.flatten(0, 1).float()
    losses = cross_entropy(logits, targets.flatten(), ignore_index=_NOTHING, reduction="none")
    return losses.view_as(targets)


def segment_loss(
    segment: Segment,
    batch: Batch,
    config: TrainingConfig,
    *,
    foreign: Tensor | None = None,
    lesson: Lesson | None = None,
    found: Tensor | None = None,
) -> SegmentLoss:
    """Compute the loss of a segment's predictions.

    Parameters
    ----------
    segment, batch
        What was read, of which episodes.
    config
        How tokens are weighted.
    foreign
        The losses [rows, tokens] of the same tokens with foreign chunks, if they were tried.
    lesson
        What full attention predicts, for all tokens of the batch.
    found
        Which tokens' next ones are trained on [rows, tokens], bool; the sums are of all. None for all.
    """
    places, targets = _targets(segment, batch)
    own = batch.weights.gather(1, places)
    known = (targets != _NOTHING) & (own > 0)
    distant = batch.distant.gather(1, places) & known
    losses = token_losses(segment, batch)
    tried = known if foreign is not None else torch.zeros_like(known)
    others = losses.detach() if foreign is None else foreign
    marked = ((losses, known), (losses, distant), (others, tried), (losses, tried))
    with torch.no_grad():
        each = [[torch.where(mark, some.double(), 0.0).sum(), mark.sum().double()] for some, mark in marked]
        sums = torch.stack([*each[0], *each[1], each[2][0], *each[3]])
    weights = known * own * (1 + config.long_range_weight * distant)
    if found is not None:
        weights = weights * found.to(weights.device)
    if foreign is not None:
        weights = weights * (foreign - losses.detach()).exp().clamp(max=config.contrast)
    if lesson is not None:
        taught = lesson.at(places)
        needed = known & ((taught.losses + _MARGIN < losses.detach()) | batch.is_answer.gather(1, places))
        share = config.distill * needed
        losses = (1 - share) * losses + share * taught.divergence(segment.logits)
    return SegmentLoss((losses * weights).sum(), weights.sum(), sums)


def _targets(segment: Segment, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return where a segment's tokens stand in the batch, 0 for padding, and what follows them [rows, tokens]."""
    places = segment.tokens.clamp(min=0)
    return places, batch.targets.gather(1, places).masked_fill(segment.tokens < 0, _NOTHING)
