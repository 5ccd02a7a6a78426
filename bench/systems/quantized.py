"""Full attention over a K-V cache that transformers quantizes."""

from __future__ import annotations

from math import gcd
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, QuantizedCache

from memlong import MemoryConfig
from memlong.errors import MissingDependencyError, UnsupportedModelError
from systems.cached import Cached

RESIDUAL = 128
"""Tokens that are quantized together, as by default in transformers: until they are so many, the last are not."""


class QuantizedKv(Cached):
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

    def __init__(self, model: PreTrainedModel, tokenizer: Any, config: MemoryConfig) -> None:
        try:
            import optimum.quanto  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError(
                f"kind='quantized-{self.bits}' needs the package optimum-quanto ({error}): pip install optimum-quanto"
            ) from error
        super().__init__(model, tokenizer, config)

    def empty(self) -> QuantizedCache:
        """Return a cache of nothing."""
        try:
            return QuantizedCache(
                "quanto", self.model.config, self.bits, q_group_size=self._group, residual_length=RESIDUAL
            )
        except ValueError as error:
            raise UnsupportedModelError(
                f"transformers does not quantize the K-V of {self.model.config.model_type}: {error}"
            ) from error

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


class FourBits(QuantizedKv):
    """In four bits."""

    bits = 4


class TwoBits(QuantizedKv):
    """In two bits."""

    bits = 2
