"""Describe a model's layers, and what memory stores per token."""

from __future__ import annotations

from dataclasses import replace

import torch

from memlong.bank.store.codec import make_codec
from memlong.decoder import MemoryDecoder
from memlong.decoder.model.layout import ModelLayout

_DTYPES = (torch.float32, torch.bfloat16)


def kinds_of_layers(layout: ModelLayout) -> str:
    """List the kinds of layers in a model, such as ``"full attention, sliding window"``."""
    windows = {layer.sliding_window is None for layer in layout.layers.values()}
    kinds = {
        "full attention": True in windows,
        "sliding window": False in windows,
        "state alongside attention": any(layout.states.get(layer) for layer in layout.layers),
        "state instead of attention": any(
            count for layer, count in layout.states.items() if layer not in layout.layers
        ),
        "K-V of another layer": len(layout.readers) > len(layout.layers),
    }
    return ", ".join(kind for kind, there in kinds.items() if there)


def stored_of_a_token(decoder: MemoryDecoder) -> str:
    """Describe what memory stores per token and layer, such as ``"keys and values"``."""
    layers = [decoder.model_layout.layers[layer] for layer in decoder.source.stored_layers]
    if any(layer.keys_second for layer in layers):
        return "latent vector and rotary key"
    if any(not layer.shape.is_even for layer in layers):
        return "keys and values of different widths"
    return "keys and values" + (" of different shapes" if len({layer.shape for layer in layers}) > 1 else "")


def token_bytes(decoder: MemoryDecoder) -> dict[str, int]:
    """Return the bytes per token of memory over all layers, by storage dtype.

    Without the chunk's embedding, which is small in comparison.
    """
    layout, tokens = decoder.layout, decoder.config.chunk_size
    dtypes = {str(dtype).removeprefix("torch."): replace(layout, dtype=dtype) for dtype in _DTYPES}
    sizes = {name: each.nbytes for name, each in dtypes.items()}
    sizes["int8"] = make_codec(layout, "int8").nbytes  # with its scales
    return {name: -(-size // tokens) for name, size in sizes.items()}
