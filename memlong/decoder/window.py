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
from memlong.decoder.buffers import LayerBuffer, LayerGroup, turned
from memlong.decoder.rope import AngleCache
from memlong.decoder.stored import tensor_of

Columns = Sequence[slice] | Tensor
"""Columns to keep: stretches that all rows keep, or the columns [rows, kept] of each row, int64, on the device."""

_PADDING = -1


class GroupWindow:
    """The window of one group of layers.

    Attributes
    ----------
    buffer
        Keys, values, and room for retrieved ones; None before the first token.
    count
        Columns that are filled.
    """

    def __init__(
        self, group: LayerGroup, capacity: int, buffer: LayerBuffer | None = None, count: int = 0
    ) -> None:
        self.group = group
        self.buffer = buffer
        self.count = count
        self._capacity = capacity
        self._raw: Tensor | None = None  # un-rotated keys of the first columns; the others' come when wanted
        self._fresh: dict[int, tuple[Tensor, Tensor]] = {}  # of this forward call, where it records gradients
        # The buffer of the window before this one, to be written over by the next: fresh memory costs a CPU more time
        # than what is written there. On CUDA, torch's allocator sees to that.
        self._spare: LayerBuffer | None = None

    def expecting(self) -> GroupWindow:
        """Return the same window, for a forward call to write behind it."""
        other = copy(self)
        other._fresh = {}  # noqa: SLF001 - its own
        return other

    def put(self, place: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take in new K-V [rows, kv_heads, new, head_dim] of a layer of the group, and give those of its window."""
        if torch.is_grad_enabled():
            self._fresh[place] = keys, values
            held = () if self.buffer is None else self.buffer.window(self.count)
            parts = [states[:, place] for states in held]
            if not parts:
                return keys, values
            return torch.cat([parts[0], keys], dim=2), torch.cat([parts[1], values], dim=2)
        end = self.count + keys.shape[2]
        buffer = self._with_space(end, keys)
        new = slice(buffer.memory + self.count, buffer.memory + end)
        buffer.keys[:, place, :, new] = keys
        buffer.values[:, place, :, new] = values
        window = slice(buffer.memory, buffer.memory + end)
        return buffer.keys[:, place, :, window], buffer.values[:, place, :, window]

    def with_memory(self, place: int, columns: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer's memory and of so many columns of its window behind it."""
        assert self.buffer is not None  # noqa: S101 - `put` comes first
        end = self.buffer.memory + columns
        return self.buffer.keys[:, place, :, :end], self.buffer.values[:, place, :, :end]

    def complete(self, new: int) -> None:
        """Note that a forward call has filled ``new`` columns. No later gradient reaches what made them."""
        if self._fresh:
            with torch.no_grad():
                for place, (keys, values) in sorted(self._fresh.items()):
                    self.put(place, keys.detach(), values.detach())
            self._fresh = {}
        self.count += new

    def raw_keys(self, angles: AngleCache) -> Tensor:
        """Un-rotated keys [rows, layers, kv_heads, columns, head_dim]; ``angles`` are those of the window's columns."""
        parts = self._raw_parts(angles)
        self._raw = parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)
        return self._raw

    def _raw_parts(self, angles: AngleCache) -> list[Tensor]:
        """Un-rotated keys of the columns for which they were known, and of the rest."""
        assert self.buffer is not None  # noqa: S101 - the window holds something
        known = 0 if self._raw is None else self._raw.shape[3]
        parts = [] if self._raw is None else [self._raw]
        if known < self.count or not parts:
            keys, _ = self.buffer.window(self.count)
            rope = self.group.rope
            parts.append(turned(keys[:, :, :, known:], angles.of(rope, known), rope.unrotated))
        return parts

    def values(self) -> Tensor:
        """Values [rows, layers, kv_heads, columns, head_dim]."""
        assert self.buffer is not None  # noqa: S101 - the window holds something
        return self.buffer.window(self.count)[1]

    def moved(self, columns: Columns, before: AngleCache, after: AngleCache, memory: int) -> GroupWindow:
        """Return the window of these columns, rotated to ``after``, with so many columns for retrieved tokens."""
        raw = _taken(self._raw_parts(before), columns)
        kept = raw.shape[3]
        other = self.emptied(raw[:, 0], kept, memory)
        assert other.buffer is not None  # noqa: S101 - just made
        if not raw.is_cuda:
            other._spare = self.buffer  # noqa: SLF001 - its own
        keys, values = other.buffer.window(kept)
        if kept:
            rope = self.group.rope
            turned(raw, after.of(rope), rope.rotated, out=keys)
            _take([self.values()], columns, values)
        other._raw = raw  # noqa: SLF001 - its own
        return other

    def emptied(self, like: Tensor, columns: int, memory: int) -> GroupWindow:
        """Return a window with so many columns, and columns for retrieved tokens, all of them still to be written."""
        room = memory if self.group.has_memory else 0
        shape = (len(self.group.layers), max(columns, self._capacity), room)
        if self._spare is not None and self._spare.fits(like, *shape):
            buffer = LayerBuffer(self._spare.keys, self._spare.values, room)
        else:
            buffer = LayerBuffer.like(like, *shape)
        return GroupWindow(self.group, self._capacity, buffer, columns)

    def of_rows(self, rows: Tensor) -> GroupWindow:
        """Return the window of these rows."""
        other = copy(self)
        other._spare = None  # noqa: SLF001 - its own, and not also another's
        if self.buffer is not None:
            other.buffer = self.buffer.of_rows(rows)
            other._raw = None if self._raw is None else self._raw.index_select(0, rows)  # noqa: SLF001
        return other

    def holding(self, keys: Tensor, raw_keys: Tensor, values: Tensor, memory: int) -> GroupWindow:
        """Return a window of K-V [rows, layers, kv_heads, columns, head_dim], and columns for retrieved tokens."""
        other = self.emptied(keys[:, 0], keys.shape[3], memory)
        assert other.buffer is not None  # noqa: S101 - just made
        for target, states in zip(other.buffer.window(other.count), (keys, values), strict=True):
            target.copy_(states)
        other._raw = raw_keys  # noqa: SLF001 - its own
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of keys, rotated and not, and values."""
        held = 0 if self._raw is None else self._raw.nbytes
        return held if self.buffer is None else held + self.buffer.nbytes

    def _with_space(self, columns: int, like: Tensor) -> LayerBuffer:
        if self.buffer is None or (not self.count and self.buffer.keys.dtype != like.dtype):
            before = self.buffer
            memory = 0 if before is None else before.memory
            self.buffer = LayerBuffer.like(like, len(self.group.layers), max(columns, self._capacity), memory)
            if before is not None:  # as under autocast: the model's K-V are of another dtype than its weights
                self.buffer.hold_memory(before.keys[:, :, :, :memory], before.values[:, :, :, :memory])
        elif not self.buffer.has_space(columns):
            self.buffer = self.buffer.grown(columns, self.count)
        return self.buffer


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


def _taken(parts: Sequence[Tensor], columns: Columns) -> Tensor:
    """Copy columns of [rows, layers, kv_heads, columns, head_dim], which is given in parts that follow each other."""
    if isinstance(columns, Tensor):
        states = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=3)
        return states.take_along_dim(columns[:, None, None, :, None], dim=3)
    return torch.cat(_stretches(parts, columns), dim=3)


def _take(parts: Sequence[Tensor], columns: Columns, out: Tensor) -> None:
    """Copy columns as :func:`_taken` does, to ``out``."""
    if isinstance(columns, Tensor):
        out.copy_(_taken(parts, columns))
        return
    done = 0
    for piece in _stretches(parts, columns):
        out[:, :, :, done : done + piece.shape[3]] = piece
        done += piece.shape[3]


def _stretches(parts: Sequence[Tensor], columns: Sequence[slice]) -> list[Tensor]:
    found, first = [], 0
    starts = []
    for part in parts:
        starts.append(first)
        first += part.shape[3]
    for stretch in columns:
        for start, part in zip(starts, parts, strict=True):
            low, high = max(stretch.start - start, 0), min(stretch.stop - start, part.shape[3])
            if low < high or (stretch.start == stretch.stop and part is parts[0]):
                found.append(part[:, :, :, low : max(low, high)])
    return found
