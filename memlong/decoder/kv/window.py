"""The local window: sink tokens and the latest tokens of every row.

Keys are held twice: un-rotated, for the bank and for moving the window, and rotated to their current positions, for
attention. The window is small and bounded, and rounding errors never add up. Which token a column holds, and at which
position, is kept on the host, so that nothing has to wait for a device to know it.

Sliding-window layers that do not attend to memory keep what they see themselves, however long the local window is. The
states of recurrent layers are here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from memlong.bank.store.copying import to_device
from memlong.decoder.arrays import Bools, Ints
from memlong.decoder.kv.buffers import LayerGroup
from memlong.decoder.kv.columns import PADDING, WindowColumns
from memlong.decoder.kv.group_window import GroupWindow, KeptColumns
from memlong.decoder.kv.states import Key, States
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.model.rope import AngleCache
from memlong.decoder.persistence.saved_values import tensor_of

PositionsOf = Callable[[Ints, int | None], Ints]
"""From tokens [rows, columns], and the reach of their layers, to their positions."""


@dataclass(frozen=True, eq=False)
class LocalWindow:
    """The windows of all rows and layers.

    A forward call fills a window of its own (`expecting`, then `complete`), so that a failure leaves this one as it
    was. Both may share a buffer, of which each knows its own columns.

    Attributes
    ----------
    groups
        The windows of layers that are moved together.
    columns
        By reach, what the columns of some layers hold.
    states
        What recurrent layers carry.
    memory
        Columns for retrieved tokens, to the left of the window of each layer that attends to them.
    """

    groups: tuple[GroupWindow, ...]
    columns: Mapping[int | None, WindowColumns]
    states: States
    memory: int
    _place: Mapping[int, tuple[int, int]]  # by layer: its group, and its index there
    _state_shapes: Mapping[Key, torch.Size]
    _like: Tensor  # empty, of the model's dtype, on its device

    @classmethod
    def empty(
        cls, model_layout: ModelLayout, groups: Sequence[LayerGroup], rows: int, capacity: int, like: Tensor
    ) -> LocalWindow:
        """Make a window that holds nothing.

        Parameters
        ----------
        model_layout
            The model's layers.
        groups
            Those that attend, grouped as they are moved.
        rows
            Rows of the batch.
        capacity
            Columns that the window usually grows to.
        like
            A tensor of the model's dtype, on its device.
        """
        place = {
            layer: (number, place)
            for number, group in enumerate(groups)
            for place, layer in enumerate(group.layers)
        }
        nothing = np.empty((rows, 0), dtype=np.int64)
        columns = {
            reach: WindowColumns(nothing, nothing, reach)
            for reach in (None, *(group.reach for group in groups))
        }
        windows = tuple(GroupWindow(group, capacity) for group in groups)
        states, shapes = States.none(rows), model_layout.state_shapes
        return cls(windows, columns, states, 0, place, shapes, like.new_empty(0))

    @property
    def _device(self) -> torch.device:
        return self._like.device

    def group_of(self, layer: int) -> tuple[GroupWindow, int]:
        """Return the group of a layer, and the layer's index there."""
        number, place = self._place[layer]
        return self.groups[number], place

    def of_rows(self, rows: Sequence[int]) -> LocalWindow:
        """Return a window of these rows, which may come more than once."""
        chosen = to_device(torch.tensor(list(rows), device="cpu"), self._device)
        windows = tuple(window.of_rows(chosen) for window in self.groups)
        held = {reach: each.of_rows(rows) for reach, each in self.columns.items()}
        return replace(self, groups=windows, columns=held, states=self.states.of_rows(rows))

    def joined(self, parts: Sequence[LocalWindow], rows: Sequence[Sequence[int]]) -> LocalWindow:
        """Return the window of all rows from parts that were run separately; ``rows`` says which are in each.

        Parts with fewer new columns are padded.
        """
        together = [row for some in rows for row in some]
        order = np.argsort(np.asarray(together))
        held = {}
        for reach in self.columns:
            width = max(part.columns[reach].tokens.shape[1] for part in parts)
            tokens, positions = (
                np.concatenate(
                    [
                        np.pad(each, ((0, 0), (0, width - each.shape[1])), constant_values=padding)
                        for each in (getattr(part.columns[reach], name) for part in parts)
                    ]
                )[order]
                for name, padding in (("tokens", PADDING), ("positions", 0))
            )
            held[reach] = WindowColumns(tokens, positions, reach)
        on_device = to_device(torch.from_numpy(order), self._device)
        windows = tuple(
            window.joined(
                [part.groups[number] for part in parts],
                [len(some) for some in rows],
                on_device,
                held[window.group.reach].tokens.shape[1],
            )
            for number, window in enumerate(self.groups)
        )
        states = self.states
        for part, some in zip(parts, rows, strict=True):
            states = states.with_rows(some, part.states)
        return replace(self, groups=windows, columns=held, states=states)

    @property
    def tokens(self) -> Ints:
        """[rows, columns] of the local window."""
        return self.columns[None].tokens

    @property
    def valid(self) -> Bools:
        """[rows, columns] of the local window: False for padding."""
        return self.columns[None].valid

    def columns_of(self, layer: int) -> WindowColumns:
        """Return which tokens a layer's columns hold."""
        number, _ = self._place[layer]
        return self.columns[self.groups[number].group.reach]

    @property
    def nbytes(self) -> int:
        """Bytes of keys (rotated and not), values and states, including retrieved K-V, without spare buffers."""
        return sum(window.nbytes for window in self.groups) + self.states.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that the window holds, for `of_tensors`."""
        found = {_tokens_name(reach): torch.from_numpy(held.tokens) for reach, held in self.columns.items()}
        for layer, (number, place) in sorted(self._place.items()):
            window = self.groups[number]
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
        self, tensors: Mapping[str, Tensor], positions_of: PositionsOf, memory: int
    ) -> LocalWindow:
        """Return a window that holds what a saved one held; ValueError or KeyError if that is impossible.

        Parameters
        ----------
        tensors
            What `tensors` gave.
        positions_of
            Gives the tokens' positions.
        memory
            Columns for retrieved tokens.
        """
        held = {}
        for reach in self.columns:
            name, rows = _tokens_name(reach), len(self.tokens)
            tokens = np.array(tensor_of(tensors, name, rows, None).cpu().numpy())
            held[reach] = WindowColumns(tokens, positions_of(tokens, reach), reach)
        windows = []
        for window in self.groups:
            group, tokens = window.group, held[window.group.reach].tokens
            if not tokens.shape[1]:
                windows.append(window.emptied(len(tokens), self._like, 0, memory))
                continue
            shape = group.shape
            of_keys = (len(tokens), shape.kv_heads, tokens.shape[1], shape.head_dim)
            of_values = (len(tokens), shape.value_heads, tokens.shape[1], shape.value_dim)
            keys, raw_keys, values = (
                torch.stack(
                    [
                        tensor_of(tensors, f"window.{layer}.{name}", *size, like=self._like)
                        for layer in group.layers
                    ],
                    dim=1,
                )
                for name, size in (("keys", of_keys), ("raw_keys", of_keys), ("values", of_values))
            )
            windows.append(window.holding(keys, raw_keys, values, memory))
        states = self.loaded_states("states", tensors)
        return replace(self, groups=tuple(windows), columns=held, states=states, memory=memory)

    def loaded_states(self, prefix: str, tensors: Mapping[str, Tensor]) -> States:
        """Read states that were saved; ValueError or KeyError if they are not this model's."""
        if not self._state_shapes:
            return States.none(len(self.tokens))
        return States.loaded(prefix, tensors, len(self.tokens), self._state_shapes, self._device)

    def expecting(self, tokens: Ints, positions: Ints) -> LocalWindow:
        """Return a window that a forward call fills with the tokens [rows, new] at these ``positions``."""
        return replace(
            self,
            groups=tuple(window.expecting() for window in self.groups),
            columns={reach: held.appended(tokens, positions) for reach, held in self.columns.items()},
        )

    def complete(self, new: int, states: Mapping[Key, Tensor] | None) -> LocalWindow:
        """Return the window when the forward call has filled the ``new`` expected columns and left these states."""
        for window in self.groups:
            window.complete(new)
        return self if states is None else self.with_states(self.states.replaced(states))

    def with_states(self, states: States) -> LocalWindow:
        """Return this window with other states."""
        return replace(self, states=states)

    def with_memory(self, layer: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return K-V of a layer's memory and of its window, which now has this many columns."""
        number, place = self._place[layer]
        return self.groups[number].with_memory(place, columns)

    def hold_memory(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], angles: AngleCache | None
    ) -> None:
        """Write the K-V of all retrieved tokens into the buffers, by group of layers that attend to them.

        With ``angles``, keys are un-rotated and rotated to those.
        """
        windows = [window for window in self.groups if window.group.has_memory]
        for window, some_keys, some_values in zip(windows, keys, values, strict=True):
            assert window.buffer is not None  # noqa: S101 - it was made with columns for memory
            rope = window.group.rope
            where = None if angles is None else angles.of(rope)
            window.buffer.hold_memory(some_keys, some_values, where, rope.rotated, window.group.heads)

    def keys_and_values(
        self, row: int, start: int, end: int, layers: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return un-rotated keys, and values, of tokens ``start`` to ``end``, by layer: [heads, tokens, width]."""
        found = []
        for layer in layers:
            number, place = self._place[layer]
            window, chosen = self.groups[number], self._chosen(layer, row, start, end)
            keys, values = window.raw_keys(self._angles_of(window)), window.values()
            found.append((keys[row, place][:, chosen], values[row, place][:, chosen]))
        return found

    def stacked(self, row: int, start: int, end: int, layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return un-rotated keys, and values, of layers that are alike: copies [layers, heads, tokens, width]."""
        number, _ = self._place[layers[0]]
        window = self.groups[number]
        if window.group.layers == layers:  # all of a group, as is usual: one copy
            chosen = self._chosen(layers[0], row, start, end)
            keys, values = window.raw_keys(self._angles_of(window)), window.values()
            keys, values = keys[row][:, :, chosen], values[row][:, :, chosen]
            return (keys.clone(), values.clone()) if isinstance(chosen, slice) else (keys, values)
        keys_of, values_of = zip(*self.keys_and_values(row, start, end, layers), strict=True)
        return torch.stack(keys_of), torch.stack(values_of)

    def _chosen(self, layer: int, row: int, start: int, end: int) -> slice | Tensor:
        """Columns of a layer that hold the tokens ``start`` to ``end`` of a row, in order."""
        tokens = self.columns_of(layer).tokens[row]
        columns = np.flatnonzero((tokens >= start) & (tokens < end))
        if columns[-1] - columns[0] == len(columns) - 1:
            return slice(int(columns[0]), int(columns[-1]) + 1)
        return to_device(torch.from_numpy(columns), self._device)

    def moved(
        self, wanted: Mapping[int | None, Bools], positions_of: PositionsOf, memory: int
    ) -> LocalWindow:
        """Return a window of the columns in ``wanted``, re-positioned, with ``memory`` columns for retrieved tokens."""
        held: dict[int | None, WindowColumns] = {}
        columns: dict[int | None, KeptColumns] = {}
        for reach, marked in wanted.items():
            kept, tokens = self.columns[reach].kept(marked)
            columns[reach] = (
                to_device(torch.from_numpy(kept), self._device) if isinstance(kept, np.ndarray) else kept
            )
            held[reach] = WindowColumns(tokens, positions_of(tokens, reach), reach)
        windows = []
        for window in self.groups:
            reach = window.group.reach
            if window.buffer is None:
                windows.append(window.emptied(len(self.tokens), self._like, 0, memory))
            else:
                after = held[reach].angles(self._device)
                windows.append(window.moved(columns[reach], self._angles_of(window), after, memory))
        return replace(self, groups=tuple(windows), columns=held, memory=memory)

    def _angles_of(self, window: GroupWindow) -> AngleCache:
        return self.columns[window.group.reach].angles(self._device)


def _tokens_name(reach: int | None) -> str:
    return "window.tokens" if reach is None else f"window.tokens.{reach}"
