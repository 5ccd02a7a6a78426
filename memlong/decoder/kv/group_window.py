"""The window of layers that are alike: their buffer, and the un-rotated keys of what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from memlong.decoder.kv.buffers import LayerBuffer, LayerGroup, turned
from memlong.decoder.model.rope import AngleCache

Columns = Sequence[slice] | Tensor
"""Columns to keep: stretches that all rows keep, or the columns [rows, kept] of each row, int64, on the device."""


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
        other = self.emptied(len(raw), raw, kept, memory)
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

    def emptied(self, rows: int, like: Tensor, columns: int, memory: int) -> GroupWindow:
        """Return a window with so many columns, and columns for retrieved tokens, all of them still to be written."""
        room = memory if self.group.has_memory else 0
        sizes = (rows, max(columns, self._capacity), room)
        if self._spare is not None and self._spare.fits(*sizes, like):
            buffer = LayerBuffer(self._spare.keys, self._spare.values, room)
        else:
            buffer = LayerBuffer.of(self.group, *sizes, like)
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
        """Return a window of K-V [rows, layers, heads, columns, width], and columns for retrieved tokens."""
        other = self.emptied(len(keys), keys, keys.shape[3], memory)
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

    def joined(
        self, parts: Sequence[GroupWindow], rows_of: Sequence[int], order: Tensor, columns: int
    ) -> GroupWindow:
        """Return the window of rows that went on apart from this one, padded behind to so many columns.

        ``rows_of`` is how many rows each part has, and ``order`` [rows] tells where in the parts, put one after the
        other, each row is.
        """
        held = [part.buffer for part in parts if part.buffer is not None]
        if not held:
            return self
        memory = held[0].memory
        rows = len(order)
        other = self.emptied(rows, held[0].keys, columns, memory)
        assert other.buffer is not None  # noqa: S101 - just made
        known = 0 if self._raw is None else self._raw.shape[3]
        start = 0
        other.buffer.keys[:, :, :, memory : memory + columns] = 0
        other.buffer.values[:, :, :, memory : memory + columns] = 0
        for part, count in zip(parts, rows_of, strict=True):
            where = torch.nonzero((order >= start) & (order < start + count))[:, 0]
            picked, end = order[where] - start, memory + part.count
            start += count
            if part.buffer is None:  # rows that have read nothing yet
                continue
            for target, states in zip(
                (other.buffer.keys, other.buffer.values), (part.buffer.keys, part.buffer.values), strict=True
            ):
                target[where, :, :, :end] = states[picked, :, :, :end]
        if known:
            other._raw = self._raw  # noqa: SLF001 - its own
        return other

    def _with_space(self, columns: int, like: Tensor) -> LayerBuffer:
        if self.buffer is None or (not self.count and self.buffer.keys.dtype != like.dtype):
            before = self.buffer
            memory = 0 if before is None else before.memory
            self.buffer = LayerBuffer.of(self.group, len(like), max(columns, self._capacity), memory, like)
            if before is not None:  # as under autocast: the model's K-V are of another dtype than its weights
                self.buffer.hold_memory(before.keys[:, :, :, :memory], before.values[:, :, :, :memory])
        elif not self.buffer.has_space(columns):
            self.buffer = self.buffer.grown(self.group, columns, self.count)
        return self.buffer


def _taken(parts: Sequence[Tensor], columns: Columns) -> Tensor:
    """Copy columns of [rows, layers, kv_heads, columns, head_dim], which is given in parts that follow each other."""
    if isinstance(columns, Tensor):
        states = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=3)
        return states.take_along_dim(columns[:, None, None, :, None], dim=3)
    return torch.cat(_stretches(parts, columns), dim=3)


def _take(parts: Sequence[Tensor], columns: Columns, out: Tensor) -> None:
    """Copy columns as `_taken` does, to ``out``."""
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
