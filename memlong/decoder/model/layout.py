"""A model's layers as memory uses them; probe.py finds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from memlong.decoder.model.rope import LayerRope


@dataclass(frozen=True)
class KvShape:
    """What a layer's cache holds of a token: keys, the part that rotates with the position, and values.

    Attributes
    ----------
    kv_heads, head_dim
        Of keys.
    value_heads, value_dim
        Of values.
    """

    kv_heads: int
    head_dim: int
    value_heads: int
    value_dim: int

    @property
    def is_even(self) -> bool:
        """Whether keys and values have the same shape."""
        return (self.kv_heads, self.head_dim) == (self.value_heads, self.value_dim)

    @property
    def numbers(self) -> int:
        """Numbers per token."""
        return self.kv_heads * self.head_dim + self.value_heads * self.value_dim


@dataclass(frozen=True)
class LayerLayout:
    """One layer that attends.

    Attributes
    ----------
    module
        What calls attention.
    rope
        How keys rotate.
    heads
        Of queries.
    shape
        What the cache holds of a token.
    sliding_window
        None for full attention.
    keys_second
        Whether the cache's second tensor is the one that rotates with the position: with multi-head latent attention
        the latent vector comes first, and then the rotary part of the key (DeepSeek-V2, arXiv 2405.04434).
    is_made
        Whether attention gets something that the model derives from what its cache holds.
    """

    module: nn.Module
    rope: LayerRope
    heads: int
    shape: KvShape
    sliding_window: int | None
    keys_second: bool = False
    is_made: bool = False

    @property
    def kv_heads(self) -> int:
        """Heads of keys."""
        return self.shape.kv_heads

    @property
    def head_dim(self) -> int:
        """Head dimension of the keys."""
        return self.shape.head_dim


@dataclass(frozen=True)
class ModelLayout:
    """A model's layers, and what else memory needs to know of it.

    Attributes
    ----------
    layers
        By number, ascending, the layers that attend and have K-V of their own.
    depth
        Layers of the model's cache, those without attention included.
    readers
        By attention module, the numbers of the layers whose K-V it reads; a module that several layers share reads the
        K-V of the layer that has just updated its own.
    states
        By number, how many recurrent or convolutional states a layer carries from token to token.
    state_shapes
        By layer, kind and number of a state, its shape without the rows.
    max_positions
        Positions that the model was trained on, under one and the same rotation; None if unknown.
    vocabulary
        Number of token ids.
    placeholders
        Token ids that stand for an image, a video or a sound, and for which of these.
    is_unusual
        Whether attention in some layers is more than one softmax over what the cache returns: then a trial shows
        whether memory works there.
    """

    layers: Mapping[int, LayerLayout]
    depth: int
    readers: Mapping[nn.Module, tuple[int, ...]]
    states: Mapping[int, int]
    state_shapes: Mapping[tuple[int, str, int], torch.Size]
    max_positions: int | None
    vocabulary: int
    placeholders: Mapping[int, str]
    is_unusual: bool

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The attention modules."""
        return tuple(self.readers)

    @property
    def full_attention_layers(self) -> tuple[int, ...]:
        """Layers without a sliding window; all layers, where every one has such a window."""
        full = tuple(index for index, layer in self.layers.items() if layer.sliding_window is None)
        return full or tuple(self.layers)

    def alike(self, layers: tuple[int, ...]) -> bool:
        """Whether keys and values of these layers all have one shape."""
        shapes = {self.layers[layer].shape for layer in layers}
        return len(shapes) == 1 and next(iter(shapes)).is_even
