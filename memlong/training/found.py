"""Which answers the chunks retrieved can give."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from memlong.bank import MemoryBank
from memlong.decoder import Segment
from memlong.training.documents import Episode

_NOWHERE = -1
"""The place of a token that answers nothing."""


def places_of(episode: Episode) -> Tensor:
    """Return of each token [tokens], int64, where the fact that it answers was told: the number of the token after it.

    −1 where it is not a token of an answer. Between two answers there is at least a token of a question.
    """
    places = torch.full((len(episode.tokens),), _NOWHERE, device="cpu")
    if episode.weights is None:
        return places
    counts = (episode.weights.cpu() > 0).long()
    edges = torch.cat([counts, counts.new_zeros(1)]).diff(prepend=counts.new_zeros(1))
    answers = list(
        zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True)
    )
    starts = [*episode.told, len(places)]
    for start, following in pairwise(starts):
        asked = [each for each in answers if start <= each[0] < following]
        for (first, end), place in zip(asked, episode.told[start], strict=False):  # the last may be cut off
            places[first:end] = place
    return places


def found_answers(segment: Segment, places: Tensor, banks: Sequence[MemoryBank]) -> Tensor:
    """Return for which tokens [rows, tokens], bool, on the CPU, a row has retrieved the fact that is to be answered.

    Parameters
    ----------
    segment
        What was read.
    places
        Where the fact that the next token answers was told [rows, tokens], int64, on the CPU; what answers none counts
        as found.
    banks
        Of each row. A chunk that they do not hold is not seen, as one of which a fork alone knows.
    """
    found = places == _NOWHERE
    for row, (retrieval, bank) in enumerate(zip(segment.retrievals, banks, strict=True)):
        spans = bank.spans_of([] if retrieval is None else retrieval.ids.tolist())
        for start, end in spans.tolist():
            found[row] |= (start < places[row]) & (places[row] <= end)
    return found
