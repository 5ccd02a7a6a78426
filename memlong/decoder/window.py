"""The local window: sink tokens and the latest tokens of every row, as a cache for transformers.

Keys are held twice: un-rotated, as the bank wants them and as moving the window needs them, and rotated to where they
stand now, as attention wants them. The window is small and bounded, and no rounding ever adds up. Which token a column
holds, and where it stands, is kept on the host, so that nothing has to wait for a device to know it.
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

from memlong.bank.copying import to_device
from memlong.decoder.arrays import Bools, Ints
from memlong.decoder.buffers import LayerGroup
from memlong.decoder.group_window import Columns, GroupWindow
from memlong.decoder.rope import AngleCache
from memlong.decoder.stored import tensor_of

_PADDING = -1


class WindowLayer(DynamicLayer):
    """One layer of the window, as transformers sees it during one forward call."""

    def __init__(self, window: GroupWindow, place: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._window, self._place = window, place
        self.is_initialized = window.count > 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take in the K-V of a segment, as transformers calls it, and give that of the whole window."""
        self.is_initialized = True
        self.keys, self.values = self._window.put(self._place, key_states, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Columns of the window."""
        return self._window.count if self.keys is None else int(self.keys.shape[2])


class LocalWindow(Cache):
    """The windows of all rows and layers.

    A window that has been filled is not changed any more: what comes next is a window of its own, so that whatever goes
    wrong meanwhile leaves the one at hand as it was. Both may share a buffer, of which each knows its own columns.

    Parameters
    ----------
    groups
        The model's layers, those together that are moved together.
    rows
        Rows of the batch.
    capacity
        Columns that the window usually grows to.
    like
        A tensor of the model's dtype, on its device.

    Attributes
    ----------
    tokens
        [rows, columns]: which token of its stream a column holds, counted from 0; −1 for padding. Columns of a row
        ascend; rows may have padding anywhere, since what a token sees goes by position.
    positions
        [rows, columns]: where these tokens stand.
    memory
        Columns for retrieved tokens, on the left of the window of each layer that attends to them.
    """

    def __init__(self, groups: Sequence[LayerGroup], rows: int, capacity: int, like: Tensor) -> None:
        self._empty = like.new_empty(0)
        self._device = like.device
        self._place = {
            layer: (number, place)
            for number, group in enumerate(groups)
            for place, layer in enumerate(group.layers)
        }
        self.tokens: Ints = np.empty((rows, 0), dtype=np.int64)
        self.positions = self.tokens
        self.memory = 0
        self._hold(tuple(GroupWindow(group, capacity) for group in groups))

    def _hold(self, windows: tuple[GroupWindow, ...]) -> None:
        self._windows = windows
        self._angles: AngleCache | None = None
        places = (self._place[layer] for layer in range(len(self._place)))
        self._layers = [WindowLayer(windows[number], place) for number, place in places]
        super().__init__(layers=list(self._layers))

    def _of(self, windows: tuple[GroupWindow, ...], tokens: Ints, positions: Ints) -> LocalWindow:
        other = copy(self)
        other._hold(windows)  # noqa: SLF001 - its own
        other.tokens, other.positions = tokens, positions
        return other

    def of_rows(self, rows: Sequence[int]) -> LocalWindow:
        """Return a window of these rows, which may come more than once."""
        chosen = to_device(torch.tensor(list(rows), device="cpu"), self._device)
        numbers = np.asarray(rows, dtype=np.int64)
        windows = tuple(window.of_rows(chosen) for window in self._windows)
        return self._of(windows, self.tokens[numbers], self.positions[numbers])

    @property
    def valid(self) -> Bools:
        """[rows, columns]: False for padding."""
        valid: Bools = self.tokens != _PADDING
        return valid

    @property
    def nbytes(self) -> int:
        """Bytes of keys, rotated and not, and values, retrieved ones included; what is kept for reuse apart."""
        return sum(window.nbytes for window in self._windows)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that the window holds, for :meth:`of_tensors`."""
        found = {"window.tokens": torch.from_numpy(self.tokens)}
        for layer, (number, place) in sorted(self._place.items()):
            window = self._windows[number]
            if window.buffer is not None:
                keys, values = window.buffer.window(window.count)
                states = {"keys": keys, "raw_keys": window.raw_keys(self._column_angles()), "values": values}
                found |= {
                    f"window.{layer}.{name}": state[:, place].contiguous() for name, state in states.items()
                }
        return found

    def of_tensors(
        self, tensors: Mapping[str, Tensor], place: Callable[[Ints], Ints], memory: int
    ) -> LocalWindow:
        """Return a window that holds what another one held; ValueError or KeyError if it cannot have.

        Parameters
        ----------
        tensors
            What :meth:`tensors` gave.
        place
            From tokens [rows, columns] to their positions.
        memory
            Columns for retrieved tokens.
        """
        tokens = np.array(tensor_of(tensors, "window.tokens", len(self.tokens), None).cpu().numpy())
        windows = []
        for window in self._windows:
            group = window.group
            if not tokens.shape[1]:
                windows.append(window.emptied(self._like(group), 0, memory))
                continue
            shape = (len(tokens), group.kv_heads, tokens.shape[1], group.head_dim)
            keys, raw_keys, values = (
                torch.stack(
                    [
                        tensor_of(tensors, f"window.{layer}.{name}", *shape, like=self._empty)
                        for layer in group.layers
                    ],
                    dim=1,
                )
                for name in ("keys", "raw_keys", "values")
            )
            windows.append(window.holding(keys, raw_keys, values, memory))
        other = self._of(tuple(windows), tokens, place(tokens))
        other.memory = memory
        return other

    def expecting(self, tokens: Ints, positions: Ints) -> LocalWindow:
        """Return a window that a forward call fills with the tokens [rows, new], which stand at ``positions``."""
        return self._of(
            tuple(window.expecting() for window in self._windows),
            np.concatenate([self.tokens, tokens], axis=1),
            np.concatenate([self.positions, positions], axis=1),
        )

    def complete(self, new: int) -> None:
        """Note that the forward call has filled the ``new`` columns that were expected."""
        for window in self._windows:
            window.complete(new)

    def with_memory(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return memory and window of a layer that has just updated its window, which is ``key`` and ``value``."""
        number, place = self._place[layer]
        keys, values = self._windows[number].with_memory(place, key.shape[2])
        given = self._layers[layer]
        if key is given.keys and value is given.values:
            return keys, values
        # The model made something else of them, after the cache.
        memory, memory_values = keys[:, :, : self.memory], values[:, :, : self.memory]
        return torch.cat([memory, key], dim=2), torch.cat([memory_values, value], dim=2)

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

    def columns_of(self, row: int, start: int, end: int) -> Ints:
        """Columns that hold the tokens ``start`` to ``end`` of a row, in order."""
        tokens = self.tokens[row]
        return np.flatnonzero((tokens >= start) & (tokens < end))

    def keys_and_values(self, row: int, columns: Ints, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Un-rotated keys, and values, of some columns: copies [layers, kv_heads, columns, head_dim]."""
        chosen: slice | Tensor
        if columns[-1] - columns[0] == len(columns) - 1:
            chosen = slice(int(columns[0]), int(columns[-1]) + 1)
        else:
            chosen = to_device(torch.from_numpy(columns), self._device)
        number, _ = self._place[layers[0]]
        window = self._windows[number]
        if window.group.layers == tuple(layers):  # all of a group, as is usual: one copy
            keys, values = window.raw_keys(self._column_angles()), window.values()
            keys, values = keys[row][:, :, chosen], values[row][:, :, chosen]
            return (keys.clone(), values.clone()) if isinstance(chosen, slice) else (keys, values)
        keys_of, values_of = [], []
        for layer in layers:
            number, place = self._place[layer]
            window = self._windows[number]
            keys_of.append(window.raw_keys(self._column_angles())[row, place][:, chosen])
            values_of.append(window.values()[row, place][:, chosen])
        return torch.stack(keys_of), torch.stack(values_of)

    def kept(self, wanted: Bools) -> tuple[Columns, Ints]:
        """Return the columns marked in ``wanted`` [rows, columns], and their tokens [rows, kept]."""
        if (wanted == wanted[:1]).all():
            edges = np.flatnonzero(np.diff(wanted[0].astype(np.int8), prepend=0, append=0))
            stretches = [slice(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
            return stretches or [slice(0, 0)], self.tokens[:, wanted[0]]
        # Rows keep different columns: gather each row's own, and pad the shorter rows on the left.
        width = int(wanted.sum(axis=1).max())
        columns = np.argsort(wanted, axis=1, kind="stable")[:, wanted.shape[1] - width :]
        held = np.take_along_axis(wanted, columns, axis=1)
        tokens = np.where(held, np.take_along_axis(self.tokens, columns, axis=1), _PADDING)
        return to_device(torch.from_numpy(columns), self._device), tokens

    def moved(self, columns: Columns, tokens: Ints, positions: Ints, memory: int) -> LocalWindow:
        """Return a window of these columns, which hold ``tokens``, at ``positions``, with room for retrieved tokens."""
        before, after = self._column_angles(), AngleCache(self._on_device(positions))
        windows = tuple(
            window.emptied(self._like(window.group), 0, memory)
            if window.buffer is None
            else window.moved(columns, before, after, memory)
            for window in self._windows
        )
        other = self._of(windows, tokens, positions)
        other._angles, other.memory = after, memory  # noqa: SLF001 - its own
        return other

    def _like(self, group: LayerGroup) -> Tensor:
        return self._empty.new_empty(len(self.tokens), group.kv_heads, 0, group.head_dim)

    def _column_angles(self) -> AngleCache:
        if self._angles is None:
            self._angles = AngleCache(self._on_device(self.positions))
        return self._angles

    def _on_device(self, numbers: Ints) -> Tensor:
        return to_device(torch.from_numpy(numbers), self._device)
