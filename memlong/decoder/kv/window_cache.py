"""A local window as the cache that transformers fills during one forward call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from memlong.decoder.kv.cache_layers import StatefulWindowLayer, StateLayer, WindowLayer
from memlong.decoder.kv.states import Key
from memlong.decoder.kv.window import LocalWindow
from memlong.decoder.model.layout import ModelLayout

AddMemory = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Puts what a layer has retrieved before the keys and values of its window."""


class WindowCache(Cache):
    """What transformers sees of a window during one forward call.

    Parameters
    ----------
    window
        From `LocalWindow.expecting`: the call fills it.
    model_layout
        The model's layers.

    Attributes
    ----------
    add_memory
        Joins a layer's memory and its window; None for the window alone.
    """

    def __init__(self, window: LocalWindow, model_layout: ModelLayout) -> None:
        self._window = window
        layers = [self._layer(number, model_layout) for number in range(model_layout.depth)]
        self._window_layers = {n: each for n, each in enumerate(layers) if isinstance(each, WindowLayer)}
        self._state_layers = {n: each for n, each in enumerate(layers) if isinstance(each, StateLayer)}
        self.add_memory: AddMemory | None = None
        super().__init__(layers=[*layers])

    def _layer(self, number: int, model_layout: ModelLayout) -> DynamicLayer | StateLayer:
        count = model_layout.states.get(number)
        layer: DynamicLayer | StateLayer
        if number in model_layout.layers:
            group, place = self._window.group_of(number)
            second = model_layout.layers[number].keys_second
            if count is None:
                return WindowLayer(group, place, keys_second=second)
            layer = StatefulWindowLayer(count, group, place, keys_second=second)
        elif count is None:
            return DynamicLayer()  # neither attends nor carries a state
        else:
            layer = StateLayer(number_of_states=count)
        layer.begin_with(self._window.states.of_layer(number))
        return layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the K-V of a layer, as transformers calls it, and return that of its memory and its window."""
        layer = self._window_layers[layer_idx]
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        if self.add_memory is not None:
            keys, values = self.add_memory(layer_idx, keys, values)
        return layer.in_order(keys, values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of a layer, 0 if it does not attend; for layer 0 of any kind, those of the local window."""
        layer = self._window_layers.get(layer_idx)
        if layer is not None:
            return layer.get_seq_length()
        return 0 if layer_idx else next(iter(self._window_layers.values())).get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of a layer's columns including those of this call, and their offset."""
        return self.get_seq_length(layer_idx) + int(query_length), 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether a layer, or any layer, has a state to continue from."""
        if layer_idx is None:
            return any(any(layer.has_previous_state.values()) for layer in self._state_layers.values())
        return bool(super().has_previous_state(layer_idx, state_idx))

    def new_states(self) -> dict[Key, Tensor] | None:
        """Return the states that the call has left, as constants; None if no layer carries any."""
        if not self._state_layers:
            return None
        states: dict[Key, Tensor] = {}
        for number, layer in self._state_layers.items():
            states |= layer.new_states(number)
        return states

    def release(self) -> None:
        """Let go of the layers when the call is over: a model may keep its last cache."""
        self.add_memory = None
        self._window_layers, self._state_layers, self.layers = {}, {}, []
