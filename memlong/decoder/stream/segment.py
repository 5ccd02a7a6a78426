"""What a forward call returns, and the iterator over the calls of a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from memlong.decoder.stream.retrieval import Retrieval


@dataclass(frozen=True)
class Segment:
    """The result of one forward call. Rows with fewer tokens are padded on the left.

    Attributes
    ----------
    input_ids
        [rows, tokens], int64; 0 where padded.
    tokens
        [rows, tokens], int64: each token's index in its stream, −1 where padded.
    logits
        [rows, tokens, vocabulary], or [rows, 1, vocabulary] if only the last were requested.
    retrievals
        What each row retrieved just before this call, or None.
    """

    input_ids: Tensor
    tokens: Tensor
    logits: Tensor
    retrievals: tuple[Retrieval | None, ...]


class Segments(Iterator[Segment]):
    """Segments that are read as they are requested; ``len()`` is how many remain."""

    def __init__(self, segments: Iterator[Segment], count: int) -> None:
        self._segments, self._left = segments, count

    def __next__(self) -> Segment:
        segment = next(self._segments)
        self._left -= 1
        return segment

    def __len__(self) -> int:
        return self._left
