"""Full attention over a K-V cache that transformers quantizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from math import gcd
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, QuantizedCache

from memlong import MemoryConfig, Segment
from memlong.decoder import Likelihood
from memlong.errors import MissingDependencyError, UnsupportedModelError
from systems.alternative import Alternative

RESIDUAL = 128
"""Tokens that are quantized together, as by default in transformers: until they are so many, the last are not."""


class QuantizedKv(Alternative):
    """Attention to everything read so far, in `QuantizedCache` with the backend of optimum-quanto.

    Text is read segment by segment. A segment attends to its own tokens as they are, and to all before it, of which no
    more than the last `RESIDUAL` are not quantized. As in transformers, what is read first is quantized at once, and
    all tokens again where new ones are. Groups of numbers that share a scale are of one token and one head, so that
    this changes the old ones no further. At its first use, optimum-quanto compiles a part of itself, which takes
    minutes and a C++ compiler.

    Raises
    ------
    MissingDependencyError
        If optimum-quanto is not installed.
    UnsupportedModelError
        If a layer of the model does not attend to all tokens.
    """

    bits: int
    reads_whole = True

    def __init__(self, model: PreTrainedModel, tokenizer: Any, config: MemoryConfig) -> None:
        try:
            import optimum.quanto  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError(
                f"kind='quantized-{self.bits}' needs the package optimum-quanto ({error}): pip install optimum-quanto"
            ) from error
        super().__init__(model, tokenizer, config)

    def reset(self) -> None:
        """Begin a new stream."""
        self._read: list[int] = []
        try:
            self._cache = QuantizedCache(
                "quanto", self.model.config, self.bits, q_group_size=self._group, residual_length=RESIDUAL
            )
        except ValueError as error:
            raise UnsupportedModelError(
                f"transformers does not quantize the K-V of {self.model.config.model_type}: {error}"
            ) from error

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

    @property
    def device_kv_bytes(self) -> int:
        """Bytes of the cache: quantized numbers, their scales and shifts, and what is not quantized yet."""
        layers: list[Any] = self._cache.layers
        parts: list[Tensor] = []
        for layer in layers:
            if layer.is_initialized:
                parts += [layer.keys, layer.values]
                for quantized in (layer._quantized_keys, layer._quantized_values):  # noqa: SLF001 - nothing public tells
                    parts += [quantized._data._data, quantized._scale, quantized._shift]  # noqa: SLF001
        return sum(part.nbytes for part in parts)

    def kv_read_bytes(self, tokens: int, size: int) -> int:
        """Return the bytes of K-V that attention reads for token ``tokens``, as they are stored.

        To attend, transformers makes numbers of ``size`` bytes of all that is quantized.
        """
        segment = self.config.segment_size
        whole, own = divmod(tokens - 1, segment)
        recent = own + 1
        if whole:  # the first segment is quantized at once, of the others as many as fill the residual
            recent += (whole - 1) % -(-RESIDUAL // segment) * segment
        group = self._group
        found = 0
        for layer in self.model_layout.layers.values():
            numbers = layer.shape.numbers
            quantized = numbers * self.bits // 8 + numbers // group * 2 * size
            found += recent * numbers * size + (tokens - recent) * quantized
        return found

    @property
    def attended_tokens(self) -> int:
        """All."""
        return len(self._read)

    @property
    def _group(self) -> int:
        shapes = [layer.shape for layer in self.model_layout.layers.values()]
        return gcd(64, *(width for shape in shapes for width in (shape.head_dim, shape.value_dim)))

    def _after(self, tokens: list[int]) -> QuantizedCache:
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
    def _forward(self, cache: QuantizedCache, tokens: list[int], keep: int) -> Tensor:
        """Read tokens, and return the logits [1, tokens, vocabulary] of the last so many, or of all where 0."""
        self.check_positions(cache.get_seq_length() + len(tokens))
        ids = torch.tensor([tokens], device=self.model.device)
        found: Tensor = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
        return found


class FourBits(QuantizedKv):
    """In four bits."""

    bits = 4


class TwoBits(QuantizedKv):
    """In two bits."""

    bits = 2


def _forked(cache: QuantizedCache) -> QuantizedCache:
    """Return a cache that goes on from here; layers replace their tensors, and never write into them."""
    found = copy(cache)
    found.layers = [copy(layer) for layer in cache.layers]
    return found
