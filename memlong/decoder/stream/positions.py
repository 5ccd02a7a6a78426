"""The positions of sink tokens, memory and window in each position mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from memlong.decoder.arrays import Ints
from memlong.decoder.config import MemoryConfig
from memlong.decoder.model.layout import ModelLayout
from memlong.errors import InvalidArgumentError

_STEPS = 8  # a chunk


@dataclass(frozen=True)
class Placement:
    """Positions of one row: sink tokens keep theirs, all later tokens are shifted by ``offset``.

    Attributes
    ----------
    sinks
        Number of sink tokens.
    offset
        Position minus index in the stream, for the tokens of the window.
    window_start
        Position of the window's first token after the sinks.
    """

    sinks: int
    offset: int
    window_start: int


def placement_of(config: MemoryConfig, first_token: int, retrieved_tokens: int) -> Placement:
    """Place the window of a row, whose first token after the sinks is ``first_token``, after its memory.

    Without memory, the window follows the sinks directly.
    """
    if config.position_mode == "original":
        return Placement(config.sink_tokens, 0, first_token)
    start = config.sink_tokens + config.memory_span(retrieved_tokens // config.chunk_size)
    return Placement(config.sink_tokens, start - first_token, start)


def positions_of(tokens: Ints, placements: Sequence[Placement], *, sinks_apart: bool = True) -> Ints:
    """Return positions of tokens [rows, columns], given by their index in the stream; 0 for padding (−1).

    Unless ``sinks_apart``, distances are those of the text, as sliding-window layers need them.
    """
    if not sinks_apart:
        shift = np.array([row.offset for row in placements])[:, None]
        return np.where(tokens < 0, 0, tokens + shift)
    sinks, offsets = np.array([(row.sinks, row.offset) for row in placements]).T[:, :, None]
    return np.maximum(np.where(tokens < sinks, tokens, tokens + offsets), 0)


def memory_positions(config: MemoryConfig, placement: Placement, spans: Ints) -> Ints:
    """Return positions [chunks * chunk_size] of a row's retrieved chunks, whose ``spans`` [chunks, 2] ascend."""
    steps = np.arange(config.chunk_size)
    if config.position_mode == "original":
        return (np.maximum(spans[:, :1], 0) + steps).ravel()  # a null chunk lies before the text
    count = len(spans) * config.chunk_size
    if config.position_mode == "zero":
        return np.full(count, placement.window_start - 1)
    if config.position_mode == "overlaid":
        return np.tile(placement.window_start - config.chunk_size + steps, len(spans))
    if config.position_mode == "compressed":
        return (_compressed(config, placement, spans[:, 1:]) + steps).ravel()
    return np.arange(placement.window_start - count, placement.window_start)


def _compressed(config: MemoryConfig, placement: Placement, ends: Ints) -> Ints:
    """Return the first positions of chunks that end at these tokens [chunks, 1]."""
    # Chunks of another text may not end before the window: their distance is 0.
    distances = np.maximum(placement.window_start - placement.offset - ends, 0)
    scale, step = config.distance_scale(), max(1, config.chunk_size // _STEPS)
    # In steps, so that a far chunk seldom moves when the window does, and can stay where it is.
    compressed = np.rint(scale * np.log1p(distances / scale) / step).astype(np.int64) * step
    farthest = placement.window_start - config.sink_tokens - config.chunk_size
    return placement.window_start - config.chunk_size - np.minimum(compressed, farthest)


def with_positions(
    config: MemoryConfig, model_layout: ModelLayout, retrieval_layers: tuple[int, ...]
) -> MemoryConfig:
    """Return the configuration with a `position_mode`: the default is the first that the model has positions for.

    Raises
    ------
    InvalidArgumentError
        If the requested mode, or every default, needs more than the trained positions, or hides memory behind the
        sliding window of a retrieval layer.
    """
    if config.position_mode is None:
        in_order = replace(config, position_mode="before-window")
        try:
            return with_positions(in_order, model_layout, retrieval_layers)
        except InvalidArgumentError:
            config = replace(config, position_mode="zero")
    _check_trained_positions(config, model_layout)
    _check_sliding_windows(config, model_layout, retrieval_layers)
    return config


def _check_trained_positions(config: MemoryConfig, model_layout: ModelLayout) -> None:
    limit = model_layout.max_positions
    if config.position_mode == "original" or limit is None or config.position_span <= limit:
        return
    other = ", or use position_mode='zero'"
    advice = {"zero": "", "overlaid": ", or chunk_size" + other, "compressed": other}.get(
        config.position_mode or "", ", or top_k and chunk_size" + other
    )
    raise InvalidArgumentError(
        f"Sink tokens, memory and local_window ({config.local_window}) must take at most the {limit} positions that "
        f"the model was trained on, got {config.position_span}. Lower local_window{advice}"
    )


def _check_sliding_windows(
    config: MemoryConfig, model_layout: ModelLayout, retrieval_layers: tuple[int, ...]
) -> None:
    if config.backend is None or config.position_mode == "original":
        return
    windows = {layer: model_layout.layers[layer].sliding_window for layer in retrieval_layers}
    span = config.memory_span(config.top_k)
    reach = config.local_window + span
    blind = {layer: size for layer, size in windows.items() if size is not None and size < reach}
    if blind:
        least = min(blind.values())
        windows_that_fit = range(config.local_window, 0, -1)
        fits = (each for each in windows_that_fit if each + config.memory_span(config.top_k, each) <= least)
        raise InvalidArgumentError(
            f"local_window must be at most {next(fits, 0)}, got {config.local_window}: memory takes {span} "
            f"positions before it, and retrieval layers {', '.join(map(str, blind))} have a sliding window of {least}, "
            "which would hide memory from them. Lower it, or leave these layers out of retrieval_layers"
        )


def check_max_position(position: int, model_layout: ModelLayout) -> None:
    """Refuse a position that the model was not trained on, which only ``"original"`` can reach.

    Raises
    ------
    InvalidArgumentError
        Naming the position and the limit.
    """
    if model_layout.max_positions is not None and position >= model_layout.max_positions:
        raise InvalidArgumentError(
            f"Positions must be below {model_layout.max_positions}, as the model was trained, got {position}. Use "
            "position_mode='zero' or 'before-window', which re-base the window, or a shorter text"
        )
