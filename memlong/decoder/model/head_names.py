"""K-V heads by layer and number, as users write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memlong.decoder.model.layer_names import heads_by_layer, ranges
from memlong.decoder.model.layout import ModelLayout
from memlong.errors import InvalidArgumentError

Heads = Mapping[int, tuple[int, ...]]
"""By layer, ascending numbers of K-V heads."""


def parse_heads(text: str, model_layout: ModelLayout, layers: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """Turn ``"15:0+2,16:1"`` into K-V heads by layer, both ascending.

    Parameters
    ----------
    text
        What the user wrote; "all" is every head of ``layers``.
    model_layout
        The model's layers.
    layers
        Those that heads may be of.

    Raises
    ------
    InvalidArgumentError
        If the text is malformed, or names a head that these layers do not have.
    """
    if text.strip() == "all":
        return {layer: tuple(range(model_layout.layers[layer].kv_heads)) for layer in layers}
    named = heads_by_layer(text)
    for layer, heads in named.items():
        if layer not in layers:
            raise InvalidArgumentError(
                f"retrieval_heads must be of the retrieval layers {ranges(layers)}, got layer {layer}"
            )
        count = model_layout.layers[layer].kv_heads
        if max(heads) >= count:
            raise InvalidArgumentError(
                f"retrieval_heads must be below {count}, the K-V heads of layer {layer}, got {max(heads)}"
            )
    return {layer: tuple(sorted(named[layer])) for layer in sorted(named)}


def has_plain_heads(model_layout: ModelLayout, layers: tuple[int, ...]) -> bool:
    """Whether these layers attend, each by a module of its own, to cached K-V heads of one shape, without sinks."""
    readers = [some for some in model_layout.readers.values() if set(some) & set(layers)]
    return (
        model_layout.alike(layers)
        and len(readers) == len(layers)
        and all(len(some) == 1 for some in readers)
        and not any(
            layer.is_made or getattr(layer.module, "sinks", None) is not None
            for layer in map(model_layout.layers.__getitem__, layers)
        )
    )


def runs(heads: Sequence[int]) -> list[slice]:
    """Return the stretches of consecutive numbers in ascending ones."""
    found: list[slice] = []
    for head in heads:
        if found and found[-1].stop == head:
            found[-1] = slice(found[-1].start, head + 1)
        else:
            found.append(slice(head, head + 1))
    return found
