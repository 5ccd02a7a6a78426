"""Full attention over a K-V cache: a text is read once, and continued where an answer begins."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache

from memlong import Segment
from memlong.decoder import Likelihood
from systems.alternative import Alternative


class Cached(Alternative):
    """The model as it is over a cache of transformers that keeps all it has read, segment by segment."""

    reads_whole = True

    @abstractmethod
    def empty(self) -> Cache:
        """Return a cache of nothing, whose layers replace their tensors, and never write into them."""

    def reset(self) -> None:
        """Begin a new stream."""
        self._read: list[int] = []
        self._cache = self.empty()

    def read(self, input_ids: Tensor) -> None:
        """Read more of the text [1, tokens]."""
        for _ in self.stream(input_ids, logits="last"):
            pass

    def stream(self, input_ids: Tensor, *, logits: Literal["all", "last"] = "all") -> Iterator[Segment]:
        """Read more of the text [1, tokens] segment by segment."""
        for start, new in self._segments(input_ids[0].tolist()):
            found = self._forward(self._cache, new, 0 if logits == "all" else 1)
            self._read += new
            tokens = torch.arange(start, start + len(new))[None]
            yield Segment(torch.tensor([new]), tokens, found, (None,))

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:  # noqa: ARG002
        """Answer a prompt [1, tokens]; the stream stays where it is."""
        options.pop("remember", None)
        prompt = input_ids[0].tolist()
        cache = self._after(prompt[:-1])
        return self._continued(input_ids, self._read + prompt, {**options, "past_key_values": cache})

    def score(self, input_ids: Tensor, continuations: Sequence[Sequence[int]], **_: Any) -> list[Likelihood]:
        """Return how likely continuations of a prompt [1, tokens] are; the prompt is read once."""
        prompt = input_ids[0].tolist()
        asked = self._after(prompt[:-1])
        found = []
        for tokens in continuations:
            wanted = torch.tensor(list(tokens), dtype=torch.long)
            read = self._forward(_forked(asked), prompt[-1:] + wanted.tolist()[:-1], 0)
            logits = read[0, : len(wanted)].float().cpu()
            likelihoods = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
            found.append(Likelihood(likelihoods, logits.argmax(-1) == wanted))
        return found

    def _after(self, tokens: list[int]) -> Cache:
        """Return the cache after more tokens, which the stream does not know of."""
        cache = _forked(self._cache)
        for _, new in self._segments(tokens):
            self._forward(cache, new, 1)
        return cache

    def _segments(self, tokens: list[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield the index in the stream and the tokens of each segment of what comes next."""
        start, size = len(self._read), self.config.segment_size
        while tokens:
            count = size - start % size
            yield start, tokens[:count]
            start, tokens = start + min(count, len(tokens)), tokens[count:]

    @torch.no_grad()
    def _forward(self, cache: Cache, tokens: list[int], keep: int) -> Tensor:
        """Read tokens, and return the logits [1, tokens, vocabulary] of the last so many, or of all where 0."""
        self.check_positions(cache.get_seq_length() + len(tokens))
        ids = torch.tensor([tokens], device=self.model.device)
        found: Tensor = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
        return found


def _forked(cache: Cache) -> Cache:
    """Return a cache that goes on from here."""
    found = copy(cache)
    found.layers = [copy(layer) for layer in cache.layers]
    return found
