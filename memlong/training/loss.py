"""The loss of a segment: every token is predicted, the next segment's first one included."""

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


@dataclass(frozen=True)
class Batch:
    """Episodes side by side, shorter ones padded on the right.

    Attributes
    ----------
    input_ids
        [rows, tokens], int64.
    lengths
        [rows], int64.
    distant
        [rows, tokens], bool: long-range tokens.
    """

    input_ids: Tensor
    lengths: Tensor
    distant: Tensor

    @classmethod
    def of(cls, episodes: Sequence[Tensor], distance: int, device: torch.device) -> Self:
        """Put episodes [tokens] together; a token last met more than ``distance`` back is long-range."""
        marks = [torch.from_numpy(long_range_tokens(each.tolist(), distance)) for each in episodes]
        return cls(
            pad_sequence(list(episodes), batch_first=True).to(device),
            torch.tensor([len(each) for each in episodes], device=device),
            pad_sequence(marks, batch_first=True).to(device),
        )

    @property
    def mask(self) -> Tensor:
        """[rows, tokens], int64: 0 where padded."""
        places = torch.arange(self.input_ids.shape[1], device=self.lengths.device)
        return (places < self.lengths[:, None]).long()


@dataclass(frozen=True)
class SegmentLoss:
    """What a segment cost.

    Attributes
    ----------
    mean
        What is minimised: mean negative log-likelihood of its tokens, long-range ones weighted.
    sums
        [4], float64, without gradient: unweighted sum over all tokens and their number; the same of long-range ones.
    """

    mean: Tensor
    sums: Tensor


def segment_loss(segment: Segment, batch: Batch, long_range_weight: float) -> SegmentLoss | None:
    """Score a segment's predictions; None if nothing follows any of its tokens."""
    following = segment.tokens + 1
    known = (segment.tokens >= 0) & (following < batch.lengths[:, None])
    if not bool(known.any()):
        return None
    places = following.clamp(max=batch.input_ids.shape[1] - 1)
    targets = batch.input_ids.gather(1, places)[known]
    distant = batch.distant.gather(1, places)[known]
    losses = cross_entropy(segment.logits[known].float(), targets, reduction="none")
    weights = 1 + long_range_weight * distant
    with torch.no_grad():
        exact = losses.double()
        sums = torch.stack(
            [exact.sum(), torch.ones_like(exact).sum(), exact[distant].sum(), distant.double().sum()]
        )
    return SegmentLoss((losses * weights).sum() / weights.sum(), sums)
