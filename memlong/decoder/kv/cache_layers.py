"""The layers of a local window, as transformers sees them during one forward call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from memlong.decoder.kv.group_window import GroupWindow
from memlong.decoder.kv.states import Key


class WindowLayer(DynamicLayer):
    """One layer of the window, as transformers sees it during one forward call."""

    def __init__(self, window: GroupWindow, place: int, *, keys_second: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._window, self._place, self._keys_second = window, place, keys_second
        self._columns = window.count
        self.is_initialized = window.count > 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the K-V of a segment, as transformers calls it, and return that of the whole window."""
        keys, values = self._window.put(self._place, *self.in_order(key_states, value_states))
        self._columns, self.is_initialized = int(keys.shape[2]), True
        return keys, values

    @property
    def keys(self) -> Tensor | None:
        """Keys of the window before the call; some models check whether there are any."""
        buffer = self._window.buffer
        return buffer.window(self._window.count)[0][:, self._place] if buffer and self._window.count else None

    @keys.setter
    def keys(self, _: object) -> None:  # transformers begins a layer with none
        pass

    def in_order(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Swap what the model calls keys and values if its second tensor is the rotated one; swaps back, too."""
        return (second, first) if self._keys_second else (first, second)

    def get_seq_length(self) -> int:
        """Columns of the window."""
        return self._columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns including those of this call, and their offset."""
        return self._columns + int(query_length), 0


class StateLayer(LinearAttentionLayer):
    """The states of one layer, as transformers sees them during one forward call: copies, which it overwrites."""

    def lazy_initialization(
        self,
        conv_states: Tensor | None = None,
        recurrent_states: Tensor | None = None,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> None:
        """Make states of zeros, as transformers does."""
        if conv_states is not None:
            width = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            _set_kind(self, conv_states)
            self.conv_kernel_size[state_idx] = width
            self.conv_states[state_idx] = conv_states.new_zeros((*conv_states.shape[:-1], width))
            self.is_conv_states_initialized[state_idx] = True
        if recurrent_states is not None:
            self.recurrent_states[state_idx] = torch.zeros_like(recurrent_states)
            self.is_recurrent_states_initialized[state_idx] = True

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, *args: Any, **options: Any
    ) -> Tensor:
        """Append the inputs of a convolution; return them after those that it still needs."""
        _own(self.conv_states, state_idx)
        return super().update_conv_state(conv_states, state_idx, *args, **options)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **options: Any) -> Tensor:
        """Replace a state."""
        _own(self.recurrent_states, state_idx)
        self.has_previous_state[state_idx] = True
        return super().update_recurrent_state(recurrent_states, state_idx, **options)

    def begin_with(self, states: Mapping[Key, Tensor]) -> None:
        """Continue from copies of the states of this layer, since models overwrite them."""
        for (_, kind, index), held in states.items():
            state = held.clone()
            if kind == "conv":
                self.conv_states[index] = state
                self.conv_kernel_size[index] = state.shape[-1]
                self.is_conv_states_initialized[index] = True
                _set_kind(self, state)
            else:
                self.recurrent_states[index] = state
                self.is_recurrent_states_initialized[index] = True
            self.has_previous_state[index] = True

    def new_states(self, layer: int) -> dict[Key, Tensor]:
        """Return the states that the call has left, as constants."""
        found = {}
        for kind, states in (("conv", self.conv_states), ("recurrent", self.recurrent_states)):
            for index, state in states.items():
                if state is not None:
                    found[layer, kind, index] = state.detach()
        return found


def _set_kind(layer: Any, like: Tensor) -> None:
    layer.dtype, layer.device = like.dtype, like.device


def _own(states: dict[int, Tensor | None], index: int) -> None:
    """Write to a copy where gradients need the old state."""
    state = states.get(index)
    if state is not None and torch.is_grad_enabled():
        states[index] = state.clone()


class StatefulWindowLayer(StateLayer, WindowLayer):  # type: ignore[misc, override] # like its own
    """A layer that both attends and carries a state."""

    def __init__(self, states: int, window: GroupWindow, place: int, *, keys_second: bool) -> None:
        WindowLayer.__init__(self, window, place, keys_second=keys_second)
        StateLayer.__init__(self, number_of_states=states)
