"""The loss of a segment: every next token is predicted, including the first one of the following segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from memlong.decoder import Segment
from memlong.evaluation import long_range_tokens

_NOTHING = -100
"""Target of a token without a next token; `cross_entropy` ignores it."""


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
    """

    input_ids: Tensor
    lengths: tuple[int, ...]
    targets: Tensor
    distant: Tensor

    @classmethod
    def of(cls, episodes: Sequence[Tensor], distance: int, device: torch.device) -> Self:
        """Batch episodes [tokens]; tokens that last occurred more than ``distance`` tokens back are long-range."""
        episodes = [each.cpu() for each in episodes]
        marks = [torch.from_numpy(long_range_tokens(each.tolist(), distance)) for each in episodes]
        following = [torch.cat([each[1:], each.new_tensor([_NOTHING])]) for each in episodes]
        distant = [torch.cat([each[1:], each.new_tensor([False])]) for each in marks]
        return cls(
            pad_sequence(episodes, batch_first=True),
            tuple(map(len, episodes)),
            pad_sequence(following, batch_first=True, padding_value=_NOTHING).to(device),
            pad_sequence(distant, batch_first=True).to(device),
        )

    @property
    def mask(self) -> Tensor:
        """Padding mask [rows, tokens], int64, on the CPU: 0 for padding."""
        places = torch.arange(self.input_ids.shape[1], device="cpu")
        return (places < torch.tensor(self.lengths, device="cpu")[:, None]).long()


def tokens_between(lengths: Sequence[int], start: int, end: int) -> int:
    """Count the tokens of rows of these lengths with an index in [start, end)."""
    return sum(max(0, min(length, end) - start) for length in lengths)


@dataclass(frozen=True)
class SegmentLoss:
    """The loss of a segment, on its device.

    Attributes
    ----------
    total
        Weighted sum of the tokens' negative log-likelihoods; 0 if no token has a next token.
    weight
        Sum of the weights, detached.
    sums
        [4], float64, detached: unweighted sum over all tokens and their count, then the same for long-range tokens.
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
            torch.zeros(4, dtype=torch.float64, device=device),
        )

    @property
    def mean(self) -> Tensor:
        """The training objective: weighted mean negative log-likelihood."""
        return self.share_of(self.weight)

    def share_of(self, weight: Tensor) -> Tensor:
        """Return what these rows add to the objective of more rows, whose weights have this sum."""
        return self.total / weight.clamp(min=1.0)


def segment_loss(segment: Segment, batch: Batch, long_range_weight: float) -> SegmentLoss:
    """Compute the loss of a segment's predictions.

    Tokens without a target are masked to 0 rather than dropped: dropping would copy the logits and synchronize with the
    device to count what is left.
    """
    is_token = segment.tokens >= 0
    places = segment.tokens.clamp(min=0)
    targets = batch.targets.gather(1, places).masked_fill(~is_token, _NOTHING)
    known = targets != _NOTHING
    distant = batch.distant.gather(1, places) & known
    losses = cross_entropy(
        segment.logits.flatten(0, 1).float(), targets.flatten(), ignore_index=_NOTHING, reduction="none"
    )
    marks = torch.stack([known.flatten(), distant.flatten()])  # [2, rows x tokens]
    with torch.no_grad():
        exact = torch.where(marks, losses.double(), 0.0)
        sums = torch.stack([exact.sum(dim=1), marks.sum(dim=1).double()], dim=1).flatten()
    weights = marks[0] + long_range_weight * marks[1]
    return SegmentLoss((losses * weights).sum(), weights.sum(), sums)
