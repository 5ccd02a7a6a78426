"""Where tokens stand: the positions of sinks, memory and window, by position mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from memlong.decoder.arrays import Ints
from memlong.decoder.config import MemoryConfig
from memlong.decoder.model.layout import ModelLayout
from memlong.errors import InvalidArgumentError


@dataclass(frozen=True)
class Placement:
    """Positions of one row: sink tokens as they are, all later tokens moved by ``offset``.

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


def place(config: MemoryConfig, first_token: int, retrieved_tokens: int) -> Placement:
    """Place the window of a row, whose first token after the sinks is ``first_token``, behind its memory.

    Without memory the window follows the sinks, as in a text that starts there.
    """
    if config.position_mode == "original":
        return Placement(config.sink_tokens, 0, first_token)
    start = config.sink_tokens + config.memory_span(retrieved_tokens // config.chunk_size)
    return Placement(config.sink_tokens, start - first_token, start)


def positions_of(tokens: Ints, placements: Sequence[Placement], *, sinks_apart: bool = True) -> Ints:
    """Where tokens [rows, columns], given by their index in the stream, stand; padding (−1) stands at 0.

    Unless ``sinks_apart``, all stand as far from one another as in the text, as a sliding layer has them.
    """
    if not sinks_apart:
        shift = np.array([row.offset for row in placements])[:, None]
        return np.where(tokens < 0, 0, tokens + shift)
    sinks, offsets = np.array([(row.sinks, row.offset) for row in placements]).T[:, :, None]
    return np.maximum(np.where(tokens < sinks, tokens, tokens + offsets), 0)


def memory_positions(config: MemoryConfig, placement: Placement, spans: Ints) -> Ints:
    """Positions [chunks * chunk_size] of a row's retrieved chunks, whose ``spans`` [chunks, 2] are in order."""
    steps = np.arange(config.chunk_size)
    if config.position_mode == "original":
        return (spans[:, :1] + steps).ravel()
    count = len(spans) * config.chunk_size
    if config.position_mode == "zero":
        return np.full(count, placement.window_start - 1)
    if config.position_mode == "overlaid":
        return np.tile(placement.window_start - config.chunk_size + steps, len(spans))
    return np.arange(placement.window_start - count, placement.window_start)


def with_positions(
    config: MemoryConfig, model: ModelLayout, retrieval_layers: tuple[int, ...]
) -> MemoryConfig:
    """Return the configuration with a `position_mode`: the default is the first that the model has room for.

    Raises
    ------
    InvalidArgumentError
        If the mode that was asked for, or every default, takes the stream beyond the trained positions, or retrieval
        layers beyond their sliding windows.
    """
    if config.position_mode is None:
        in_order = replace(config, position_mode="before-window")
        try:
            return with_positions(in_order, model, retrieval_layers)
        except InvalidArgumentError:
            config = replace(config, position_mode="zero")
    _check_trained_positions(config, model)
    _check_sliding_windows(config, model, retrieval_layers)
    return config


def _check_trained_positions(config: MemoryConfig, model: ModelLayout) -> None:
    limit = model.max_positions
    if config.position_mode == "original" or limit is None or config.position_span <= limit:
        return
    advice = (
        "" if config.position_mode == "zero" else ", or top_k and chunk_size, or use position_mode='zero'"
    )
    raise InvalidArgumentError(
        f"These settings need {config.position_span} positions (sink tokens, room for memory, local_window "
        f"{config.local_window}), but the model was trained on {limit}. Lower local_window{advice}."
    )


def _check_sliding_windows(
    config: MemoryConfig, model: ModelLayout, retrieval_layers: tuple[int, ...]
) -> None:
    if config.backend is None or config.position_mode == "original":
        return
    windows = {layer: model.layers[layer].sliding_window for layer in retrieval_layers}
    span = config.memory_span(config.top_k)
    reach = config.local_window + span
    blind = {layer: size for layer, size in windows.items() if size is not None and size < reach}
    if blind:
        least = min(blind.values())
        raise InvalidArgumentError(
            f"local_window is {config.local_window}, and memory takes {span} positions before it, but retrieval layers "
            f"{', '.join(map(str, blind))} have a sliding window of {least}, which would hide memory from them. Use a "
            f"local_window of at most {max(0, least - span)}, or leave these layers out of retrieval_layers."
        )


def check_reach(position: int, model: ModelLayout) -> None:
    """Refuse a position that the model was not trained on, which only ``"original"`` can come to.

    Raises
    ------
    InvalidArgumentError
        Naming the position and the limit.
    """
    if model.max_positions is not None and position >= model.max_positions:
        raise InvalidArgumentError(
            f"The text reaches position {position}, but the model was trained on {model.max_positions}. Use "
            "position_mode='zero' or 'before-window', which re-base the window, or a shorter text."
        )
