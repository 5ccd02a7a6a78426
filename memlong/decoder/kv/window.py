"""The local window: sink tokens and the latest tokens of every row, as a cache for transformers.

Keys are held twice: un-rotated, as the bank wants them and as moving the window needs them, and rotated to where they
stand now, as attention wants them. The window is small and bounded, and no rounding ever adds up. Which token a column
holds, and where it stands, is kept on the host, so that nothing has to wait for a device to know it.

Layers with a sliding window that do not attend to memory keep what they see by themselves, however long the local
window is. Layers that carry a recurrent state have it here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from memlong.bank.store.copying import to_device
from memlong.decoder.arrays import Bools, Ints
from memlong.decoder.kv.buffers import LayerGroup
from memlong.decoder.kv.cache_layers import StatefulWindowLayer, StateLayer, WindowLayer
from memlong.decoder.kv.group_window import Columns, GroupWindow
from memlong.decoder.kv.held import PADDING, Held
from memlong.decoder.kv.states import Key, States
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.model.rope import AngleCache
from memlong.decoder.persistence.stored import tensor_of

Supply = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Put what a layer has retrieved before the keys and values of its window."""


class LocalWindow(Cache):
    """The windows of all rows and layers.

    A window that has been filled is not changed any more: what comes next is a window of its own, so that whatever goes
    wrong meanwhile leaves the one at hand as it was. Both may share a buffer, of which each knows its own columns.

    Parameters
    ----------
    layout
        What the model is made of.
    groups
        Its layers that attend, those together that are moved together.
    rows
        Rows of the batch.
    capacity
        Columns that the window usually grows to.
    like
        A tensor of the model's dtype, on its device.

    Attributes
    ----------
    held
        By reach, what the columns of some layers hold.
    states
        What layers carry besides.
    memory
        Columns for retrieved tokens, on the left of the window of each layer that attends to them.
    supply
        During a forward call, what puts them there.
    """

    def __init__(
        self, layout: ModelLayout, groups: Sequence[LayerGroup], rows: int, capacity: int, like: Tensor
    ) -> None:
        self._layout = layout
        self._empty = like.new_empty(0)
        self._device = like.device
        self._place = {
            layer: (number, place)
            for number, group in enumerate(groups)
            for place, layer in enumerate(group.layers)
        }
        nothing = np.empty((rows, 0), dtype=np.int64)
        self.held = {
            reach: Held(nothing, nothing, reach) for reach in (None, *(group.reach for group in groups))
        }
        self.memory = 0
        self._hold(tuple(GroupWindow(group, capacity) for group in groups), States.none(rows))

    def _hold(self, windows: tuple[GroupWindow, ...], states: States) -> None:
        self._windows, self.states = windows, states
        self.supply: Supply | None = None
        self._window_layers: dict[int, WindowLayer] = {}
        self._state_layers: dict[int, StateLayer] = {}

    def _make_layers(self) -> None:
        """Make what transformers sees, for one forward call."""
        layers = [self._layer(number) for number in range(self._layout.depth)]
        self._window_layers = {n: each for n, each in enumerate(layers) if isinstance(each, WindowLayer)}
        self._state_layers = {n: each for n, each in enumerate(layers) if isinstance(each, StateLayer)}
        super().__init__(layers=[*layers])

    def _layer(self, number: int) -> DynamicLayer | StateLayer:
        count = self._layout.states.get(number)
        layer: DynamicLayer | StateLayer
        if number in self._place:
            group, place = self._place[number]
            window, second = self._windows[group], self._layout.layers[number].keys_second
            if count is None:
                return WindowLayer(window, place, keys_second=second)
            layer = StatefulWindowLayer(count, window, place, keys_second=second)
        elif count is None:
            return DynamicLayer()  # neither attends nor carries anything
        else:
            layer = StateLayer(number_of_states=count)
        layer.begin_with(self.states.of_layer(number))
        return layer

    def _of(
        self, windows: tuple[GroupWindow, ...], held: Mapping[int | None, Held], states: States
    ) -> LocalWindow:
        other = copy(self)
        other._hold(windows, states)  # noqa: SLF001 - its own
        other.held = dict(held)
        return other

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in the K-V of a layer, as transformers calls it, and give that of its memory and its window."""
        layer = self._window_layers[layer_idx]
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        if self.supply is not None:
            keys, values = self.supply(layer_idx, keys, values)
        return layer.in_order(keys, values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of a layer, none of one that does not attend; of the local window, for the first whatever it is."""
        layer = self._window_layers.get(layer_idx)
        if layer is not None:
            return layer.get_seq_length()
        return 0 if layer_idx else next(iter(self._window_layers.values())).get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns of a layer with those of the coming call, and what is before them."""
        return self.get_seq_length(layer_idx) + int(query_length), 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether a layer, or any, has a state to go on from."""
        if layer_idx is None:
            return any(any(layer.has_previous_state.values()) for layer in self._state_layers.values())
        return bool(super().has_previous_state(layer_idx, state_idx))

    def of_rows(self, rows: Sequence[int]) -> LocalWindow:
        """Return a window of these rows, which may come more than once."""
        chosen = to_device(torch.tensor(list(rows), device="cpu"), self._device)
        windows = tuple(window.of_rows(chosen) for window in self._windows)
        held = {reach: each.of_rows(rows) for reach, each in self.held.items()}
        return self._of(windows, held, self.states.of_rows(rows))

    def joined(self, parts: Sequence[LocalWindow], rows: Sequence[Sequence[int]]) -> LocalWindow:
        """Return the window of all rows, of which these parts went on apart: ``rows`` tells which are in each.

        The new columns of a part that has fewer are padded.
        """
        together = [row for some in rows for row in some]
        order = np.argsort(np.asarray(together))
        held = {}
        for reach in self.held:
            width = max(part.held[reach].tokens.shape[1] for part in parts)
            tokens, positions = (
                np.concatenate(
                    [
                        np.pad(each, ((0, 0), (0, width - each.shape[1])), constant_values=padding)
                        for each in (getattr(part.held[reach], name) for part in parts)
                    ]
                )[order]
                for name, padding in (("tokens", PADDING), ("positions", 0))
            )
            held[reach] = Held(tokens, positions, reach)
        on_device = to_device(torch.from_numpy(order), self._device)
        windows = tuple(
            window.joined(
                [part._windows[number] for part in parts],  # noqa: SLF001 - its own
                [len(some) for some in rows],
                on_device,
                held[window.group.reach].tokens.shape[1],
            )
            for number, window in enumerate(self._windows)
        )
        states = self.states
        for part, some in zip(parts, rows, strict=True):
            states = states.with_rows(some, part.states)
        return self._of(windows, held, states)

    @property
    def tokens(self) -> Ints:
        """[rows, columns] of the local window."""
        return self.held[None].tokens

    @property
    def valid(self) -> Bools:
        """[rows, columns] of the local window: False for padding."""
        return self.held[None].valid

    def held_by(self, layer: int) -> Held:
        """What the columns of a layer hold."""
        number, _ = self._place[layer]
        return self.held[self._windows[number].group.reach]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, rotated and not, values, retrieved ones included, and states; what is kept for reuse apart."""
        return sum(window.nbytes for window in self._windows) + self.states.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """Return all that the window holds, for `of_tensors`."""
        found = {_tokens_name(reach): torch.from_numpy(held.tokens) for reach, held in self.held.items()}
        for layer, (number, place) in sorted(self._place.items()):
            window = self._windows[number]
            if window.buffer is not None:
                keys, values = window.buffer.window(window.count)
                states = {
                    "keys": keys,
                    "raw_keys": window.raw_keys(self._angles_of(window)),
                    "values": values,
                }
                found |= {
                    f"window.{layer}.{name}": state[:, place].contiguous() for name, state in states.items()
                }
        return found | self.states.saved("states")

    def of_tensors(
        self,
        tensors: Mapping[str, Tensor],
        place: Callable[[Ints, int | None], Ints],
        memory: int,
    ) -> LocalWindow:
        """Return a window that holds what another one held; ValueError or KeyError if it cannot have.

        Parameters
        ----------
        tensors
            What `tensors` gave.
        place
            From tokens [rows, columns], and the reach of their layers, to their positions.
        memory
            Columns for retrieved tokens.
        """
        held = {}
        for reach in self.held:
            name, rows = _tokens_name(reach), len(self.tokens)
            tokens = np.array(tensor_of(tensors, name, rows, None).cpu().numpy())
            held[reach] = Held(tokens, place(tokens, reach), reach)
        windows = []
        for window in self._windows:
            group, tokens = window.group, held[window.group.reach].tokens
            if not tokens.shape[1]:
                windows.append(window.emptied(len(tokens), self._empty, 0, memory))
                continue
            shape = group.shape
            of_keys = (len(tokens), shape.kv_heads, tokens.shape[1], shape.head_dim)
            of_values = (len(tokens), shape.value_heads, tokens.shape[1], shape.value_dim)
            keys, raw_keys, values = (
                torch.stack(
                    [
                        tensor_of(tensors, f"window.{layer}.{name}", *size, like=self._empty)
                        for layer in group.layers
                    ],
                    dim=1,
                )
                for name, size in (("keys", of_keys), ("raw_keys", of_keys), ("values", of_values))
            )
            windows.append(window.holding(keys, raw_keys, values, memory))
        other = self._of(tuple(windows), held, self.loaded_states("states", tensors))
        other.memory = memory
        return other

    def loaded_states(self, prefix: str, tensors: Mapping[str, Tensor]) -> States:
        """Read states that were saved; ValueError or KeyError if they are not this model's."""
        shapes = self._layout.state_shapes
        if not shapes:
            return States.none(len(self.tokens))
        return States.loaded(prefix, tensors, len(self.tokens), shapes, self._device)

    def expecting(self, tokens: Ints, positions: Ints) -> LocalWindow:
        """Return a window that a forward call fills with the tokens [rows, new], which stand at ``positions``."""
        other = self._of(
            tuple(window.expecting() for window in self._windows),
            {reach: held.and_then(tokens, positions) for reach, held in self.held.items()},
            self.states,
        )
        other._make_layers()  # noqa: SLF001 - its own
        return other

    def complete(self, new: int) -> None:
        """Note that the forward call has filled the ``new`` columns that were expected."""
        self.supply = None
        for window in self._windows:
            window.complete(new)
        if self._state_layers:
            left: dict[Key, Tensor] = {}
            for number, layer in self._state_layers.items():
                left |= layer.left(number)
            self.states = self.states.replaced(left)
        self._window_layers, self._state_layers, self.layers = {}, {}, []  # the call is over

    def with_states(self, states: States) -> LocalWindow:
        """Return this window with other states."""
        return self._of(self._windows, self.held, states)

    def with_memory(self, layer: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return memory and window of a layer that has just updated its window, which has so many columns."""
        number, place = self._place[layer]
        return self._windows[number].with_memory(place, columns)

    def hold_memory(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], angles: AngleCache | None
    ) -> None:
        """Take in the K-V of all retrieved tokens, by group of layers that attend to them.

        With ``angles``, keys are un-rotated and go to those.
        """
        windows = [window for window in self._windows if window.group.has_memory]
        for window, some_keys, some_values in zip(windows, keys, values, strict=True):
            assert window.buffer is not None  # noqa: S101 - it was made with columns for memory
            rope = window.group.rope
            where = None if angles is None else angles.of(rope)
            window.buffer.hold_memory(some_keys, some_values, where, rope.rotated)

    def keys_and_values(
        self, row: int, start: int, end: int, layers: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """Un-rotated keys, and values, of the tokens ``start`` to ``end``: by layer, copies [heads, tokens, width]."""
        found = []
        for layer in layers:
            number, place = self._place[layer]
            window, chosen = self._windows[number], self._chosen(layer, row, start, end)
            keys, values = window.raw_keys(self._angles_of(window)), window.values()
            found.append((keys[row, place][:, chosen], values[row, place][:, chosen]))
        return found

    def stacked(self, row: int, start: int, end: int, layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Un-rotated keys, and values, of layers that are alike: copies [layers, heads, tokens, width]."""
        number, _ = self._place[layers[0]]
        window = self._windows[number]
        if window.group.layers == layers:  # all of a group, as is usual: one copy
            chosen = self._chosen(layers[0], row, start, end)
            keys, values = window.raw_keys(self._angles_of(window)), window.values()
            keys, values = keys[row][:, :, chosen], values[row][:, :, chosen]
            return (keys.clone(), values.clone()) if isinstance(chosen, slice) else (keys, values)
        keys_of, values_of = zip(*self.keys_and_values(row, start, end, layers), strict=True)
        return torch.stack(keys_of), torch.stack(values_of)

    def _chosen(self, layer: int, row: int, start: int, end: int) -> slice | Tensor:
        """Columns of a layer that hold the tokens ``start`` to ``end`` of a row, in order."""
        tokens = self.held_by(layer).tokens[row]
        columns = np.flatnonzero((tokens >= start) & (tokens < end))
        if columns[-1] - columns[0] == len(columns) - 1:
            return slice(int(columns[0]), int(columns[-1]) + 1)
        return to_device(torch.from_numpy(columns), self._device)

    def moved(
        self, wanted: Mapping[int | None, Bools], place: Callable[[Ints, int | None], Ints], memory: int
    ) -> LocalWindow:
        """Return a window of the columns marked in ``wanted``, placed again, with room for retrieved tokens."""
        held: dict[int | None, Held] = {}
        columns: dict[int | None, Columns] = {}
        for reach, marked in wanted.items():
            kept, tokens = self.held[reach].kept(marked)
            columns[reach] = (
                to_device(torch.from_numpy(kept), self._device) if isinstance(kept, np.ndarray) else kept
            )
            held[reach] = Held(tokens, place(tokens, reach), reach)
        windows = []
        for window in self._windows:
            reach = window.group.reach
            if window.buffer is None:
                windows.append(window.emptied(len(self.tokens), self._empty, 0, memory))
            else:
                after = held[reach].angles(self._device)
                windows.append(window.moved(columns[reach], self._angles_of(window), after, memory))
        other = self._of(tuple(windows), held, self.states)
        other.memory = memory
        return other

    def _angles_of(self, window: GroupWindow) -> AngleCache:
        return self.held[window.group.reach].angles(self._device)


def _tokens_name(reach: int | None) -> str:
    return "window.tokens" if reach is None else f"window.tokens.{reach}"
