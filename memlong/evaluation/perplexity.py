"""Perplexity of a text streamed through a decoder.

It is token-weighted, banks are reset for each document, every system is scored on the same tokens, and a segment's
query uses only tokens before it (which the decoder ensures).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlong.decoder import MemoryDecoder, Segment
from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.evaluation.long_range import long_range_tokens
from memlong.evaluation.numbers import checked_logits, perplexity_of
from memlong.evaluation.recall import recall_at_k

_AT_ONCE = 1 << 19
"""Logits whose losses a CPU computes at once: few enough for its cache, where that is up to three times as fast."""


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a text, and what it was measured on.

    Attributes
    ----------
    token_nll
        [scored], float64: negative log-likelihood of each scored token, in nats, in order.
    long_range
        [scored], bool: whether a token last occurred beyond the long-range distance.
    tokens
        Number of tokens read.
    chunks_stored
        Number of chunks in the bank at the end.
    recall_at_k
        Mean recall over all searches, against exact search; None if nothing was searched.
    seconds
        Wall time of the stream.
    """

    token_nll: NDArray[np.float64]
    long_range: NDArray[np.bool_]
    tokens: int
    chunks_stored: int
    recall_at_k: float | None
    seconds: float

    @property
    def nll(self) -> float:
        """Negative log-likelihood, summed over the scored tokens, in nats."""
        return float(self.token_nll.sum())

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-likelihood."""
        return perplexity_of(self.token_nll)

    @property
    def long_range_perplexity(self) -> float | None:
        """Perplexity over the long-range tokens; None if there are none."""
        return perplexity_of(self.token_nll[self.long_range]) if self.long_range.any() else None


def evaluate_perplexity(
    decoder: MemoryDecoder,
    input_ids: Tensor,
    *,
    score_from: int = 1,
    long_range_distance: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Stream one document and score it.

    Parameters
    ----------
    decoder
        An attached decoder; its streams are reset first.
    input_ids
        [1, tokens], int64.
    score_from
        Index of the first token to score; token 0 cannot be predicted.
    long_range_distance
        In tokens; the local window by default.
    progress
        Called with the number of tokens in each forward call.

    Raises
    ------
    InvalidTextError
        If the text is shorter than one segment, or not longer than ``score_from``.
    InvalidArgumentError
        If there is more than one row, or ``score_from`` or ``long_range_distance`` is below 1.
    MemlongError
        If the model's logits are NaN.
    """
    config = decoder.config
    distance = config.local_window if long_range_distance is None else long_range_distance
    _check(input_ids, score_from, distance, config.segment_size)
    _check_retrieves(decoder)
    decoder.reset()
    losses: list[NDArray[np.float64]] = []
    recalls: list[float] = []
    started = time.perf_counter()
    aside = 0.0
    previous: Tensor | None = None  # the logits that predict the next segment's first token
    for segment in _segments(decoder, input_ids, score_from):
        first = int(segment.tokens[0, 0])
        if first + segment.tokens.shape[1] > score_from:
            losses.append(_losses(segment, previous, max(0, score_from - first)))
        previous = segment.logits[:, -1:].clone()
        pause = time.perf_counter()
        recalls += _recalls(decoder, segment)
        aside += time.perf_counter() - pause  # exact search is not part of the stream's time
        if progress is not None:
            progress(segment.tokens.shape[1])
    seconds = time.perf_counter() - started - aside
    marked = long_range_tokens(input_ids[0].tolist(), distance)[score_from:]
    stored = sum(len(bank) for bank in decoder.banks)
    recall = float(np.mean(recalls)) if recalls else None
    return Perplexity(np.concatenate(losses), marked, input_ids.shape[1], stored, recall, seconds)


def token_losses(decoder: MemoryDecoder, input_ids: Tensor) -> NDArray[np.float64]:
    """Stream one document [1, tokens] of any length, and return the loss of each token but the first, in nats.

    Raises
    ------
    MemlongError
        If the model's logits are NaN.
    """
    _check_retrieves(decoder)
    decoder.reset()
    losses = [np.empty(0)]
    previous: Tensor | None = None
    for segment in decoder.stream(input_ids):
        losses.append(_losses(segment, previous, 0))
        previous = segment.logits[:, -1:].clone()
    return np.concatenate(losses)


def _check_retrieves(decoder: MemoryDecoder) -> None:
    if decoder.config.retrieve_for != "all":
        raise InvalidArgumentError(
            "retrieve_for must be 'all' to predict a text, got 'answers', with which text that is read attends to no "
            "memory: leave it out, or load a trained decoder with changes={'retrieve_for': 'all'}"
        )


def _check(input_ids: Tensor, score_from: int, distance: int, segment_size: int) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise InvalidArgumentError(
            "input_ids must be one document, [1, tokens], got "
            f"{f'shape {tuple(input_ids.shape)}' if isinstance(input_ids, Tensor) else f'{input_ids!r:.80}'}"
        )
    if score_from < 1:
        raise InvalidArgumentError(
            f"score_from must be at least 1, as token 0 cannot be predicted, got {score_from}"
        )
    if distance < 1:
        raise InvalidArgumentError(f"long_range_distance must be at least 1 token, got {distance}")
    count = input_ids.shape[1]
    if count < segment_size:
        raise InvalidTextError(
            f"The text must have at least {segment_size} tokens, one segment, got {count}: give a longer text, or a "
            "smaller segment_size"
        )
    if count <= score_from:
        raise InvalidTextError(
            f"The text must have more than {score_from} tokens, as scoring starts there, got {count}: give a longer "
            "text, or a smaller score_from"
        )


def _segments(decoder: MemoryDecoder, input_ids: Tensor, score_from: int) -> Iterator[Segment]:
    """Stream, skipping the logits of segments without scored tokens: they take a fifth of a small model's time."""
    unscored = score_from // decoder.config.segment_size * decoder.config.segment_size
    if unscored:
        yield from decoder.stream(input_ids[:, :unscored], logits="last")
    yield from decoder.stream(input_ids[:, unscored:])


def _losses(segment: Segment, previous: Tensor | None, skip: int) -> NDArray[np.float64]:
    """Return the losses [tokens] of a segment's tokens from index ``skip`` on; a stream's first token has none."""
    logits, targets = segment.logits[0], segment.input_ids[0]
    skip = max(skip, 1) if previous is None else skip
    at_once = max(1, _AT_ONCE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    rows = logits[max(skip - 1, 0) : -1].split(at_once)
    predicting = rows if previous is None or skip else (previous[0], *rows)
    wanted = targets[skip:].split([len(each) for each in predicting])
    losses = [
        torch.nn.functional.cross_entropy(checked_logits(None, some.float()), those, reduction="none")
        for some, those in zip(predicting, wanted, strict=True)
    ]
    return torch.cat(losses).cpu().double().numpy()  # on the CPU, as not every device has float64


def _recalls(decoder: MemoryDecoder, segment: Segment) -> list[float]:
    return [
        recall_at_k(bank, retrieval.query, retrieval.scores, decoder.retrieved_chunks)
        for bank, retrieval in zip(decoder.banks, segment.retrievals, strict=False)
        if retrieval is not None
    ]
