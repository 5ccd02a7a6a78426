"""The window of a group of alike layers: their buffer, and the un-rotated keys of what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from memlong.decoder.kv.buffers import LayerBuffer, LayerGroup, turned
from memlong.decoder.model.rope import AngleCache

KeptColumns = Sequence[slice] | Tensor
"""Columns to keep: slices that all rows keep, or each row's own columns [rows, kept], int64, on the device."""


@dataclass(eq=False)
class GroupWindow:
    """The window of one group of layers.

    Attributes
    ----------
    group
        The layers.
    capacity
        Columns that the window usually grows to.
    buffer
        Keys and values, with columns for retrieved ones; None before the first token.
    count
        Columns that are filled.
    raw
        Un-rotated keys of the first columns; those of the rest are computed when needed.
    spare
        The buffer of the previous window, for the next one to overwrite: on a CPU, fresh memory costs more time than
        what is written into it. On CUDA, torch's allocator takes care of that.
    """

    group: LayerGroup
    capacity: int
    buffer: LayerBuffer | None = None
    count: int = 0
    raw: Tensor | None = None
    spare: LayerBuffer | None = None
    # New K-V of this forward call by layer, where it records gradients.
    _fresh: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def expecting(self) -> GroupWindow:
        """Return the same window, for a forward call to append to."""
        return replace(self)

    def put(self, place: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append K-V [rows, kv_heads, new, head_dim] of a layer of the group, and return those of its window."""
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
        """Return keys and values of a layer's memory followed by this many columns of its window."""
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
        """Return un-rotated keys [rows, layers, kv_heads, columns, head_dim]; ``angles`` are the columns'."""
        parts = self._raw_parts(angles)
        self.raw = parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)
        return self.raw

    def _raw_parts(self, angles: AngleCache) -> list[Tensor]:
        """Return un-rotated keys of the columns for which they were known, and of the rest."""
        assert self.buffer is not None  # noqa: S101 - the window holds something
        known = 0 if self.raw is None else self.raw.shape[3]
        parts = [] if self.raw is None else [self.raw]
        if known < self.count or not parts:
            keys, _ = self.buffer.window(self.count)
            rope = self.group.rope
            parts.append(turned(keys[:, :, :, known:], angles.of(rope, known), rope.unrotated))
        return parts

    def values(self) -> Tensor:
        """Return values [rows, layers, kv_heads, columns, head_dim]."""
        assert self.buffer is not None  # noqa: S101 - the window holds something
        return self.buffer.window(self.count)[1]

    def moved(self, columns: KeptColumns, before: AngleCache, after: AngleCache, memory: int) -> GroupWindow:
        """Return the window of these columns, rotated to ``after``, with ``memory`` columns for retrieved tokens."""
        raw = _taken(self._raw_parts(before), columns)
        kept = raw.shape[3]
        other = self.emptied(len(raw), raw, kept, memory)
        assert other.buffer is not None  # noqa: S101 - just made
        keys, values = other.buffer.window(kept)
        if kept:
            rope = self.group.rope
            turned(raw, after.of(rope), rope.rotated, out=keys)
            _take([self.values()], columns, values)
        return replace(other, raw=raw, spare=None if raw.is_cuda else self.buffer)

    def emptied(self, rows: int, like: Tensor, columns: int, memory: int) -> GroupWindow:
        """Return a window with this many columns, and columns for retrieved tokens, none of them written yet."""
        memory_columns = memory if self.group.has_memory else 0
        sizes = (rows, max(columns, self.capacity), memory_columns)
        if self.spare is not None and self.spare.fits(*sizes, like):
            buffer = LayerBuffer(self.spare.keys, self.spare.values, memory_columns)
        else:
            buffer = LayerBuffer.of(self.group, *sizes, like)
        return GroupWindow(self.group, self.capacity, buffer, columns)

    def of_rows(self, rows: Tensor) -> GroupWindow:
        """Return the window of these rows."""
        if self.buffer is None:
            return replace(self, spare=None)  # a spare buffer has one owner
        raw = None if self.raw is None else self.raw.index_select(0, rows)
        return replace(self, buffer=self.buffer.of_rows(rows), raw=raw, spare=None)

    def holding(self, keys: Tensor, raw_keys: Tensor, values: Tensor, memory: int) -> GroupWindow:
        """Return a window of K-V [rows, layers, heads, columns, width], and columns for retrieved tokens."""
        other = self.emptied(len(keys), keys, keys.shape[3], memory)
        assert other.buffer is not None  # noqa: S101 - just made
        for target, states in zip(other.buffer.window(other.count), (keys, values), strict=True):
            target.copy_(states)
        return replace(other, raw=raw_keys)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, rotated and not, and values."""
        held = 0 if self.raw is None else self.raw.nbytes
        return held if self.buffer is None else held + self.buffer.nbytes

    def joined(
        self, parts: Sequence[GroupWindow], rows_of: Sequence[int], order: Tensor, columns: int
    ) -> GroupWindow:
        """Return the window of rows that were run separately, padded on the right to ``columns`` columns.

        ``rows_of`` is how many rows each part has; ``order`` [rows] is each row's index in the concatenated parts.
        """
        held = [part.buffer for part in parts if part.buffer is not None]
        if not held:
            return self
        memory = held[0].memory
        rows = len(order)
        other = self.emptied(rows, held[0].keys, columns, memory)
        assert other.buffer is not None  # noqa: S101 - just made
        known = 0 if self.raw is None else self.raw.shape[3]
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
        return replace(other, raw=self.raw) if known else other

    def _with_space(self, columns: int, like: Tensor) -> LayerBuffer:
        if self.buffer is None or (not self.count and self.buffer.keys.dtype != like.dtype):
            before = self.buffer
            memory = 0 if before is None else before.memory
            self.buffer = LayerBuffer.of(self.group, len(like), max(columns, self.capacity), memory, like)
            if before is not None:  # under autocast, the model's K-V have another dtype than its weights
                self.buffer.hold_memory(before.keys[:, :, :, :memory], before.values[:, :, :, :memory])
        elif not self.buffer.has_space(columns):
            self.buffer = self.buffer.grown(self.group, columns, self.count)
        return self.buffer


def _taken(parts: Sequence[Tensor], columns: KeptColumns) -> Tensor:
    """Copy columns of [rows, layers, kv_heads, columns, head_dim], given in consecutive parts."""
    if isinstance(columns, Tensor):
        states = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=3)
        # [rows, kept] -> [rows, 1, 1, kept, 1]
        return states.take_along_dim(columns[:, None, None, :, None], dim=3)
    return torch.cat(_pieces(parts, columns), dim=3)


def _take(parts: Sequence[Tensor], columns: KeptColumns, out: Tensor) -> None:
    """Copy columns as `_taken` does, to ``out``."""
    if isinstance(columns, Tensor):
        out.copy_(_taken(parts, columns))
        return
    done = 0
    for piece in _pieces(parts, columns):
        out[:, :, :, done : done + piece.shape[3]] = piece
        done += piece.shape[3]


def _pieces(parts: Sequence[Tensor], columns: Sequence[slice]) -> list[Tensor]:
    found, first = [], 0
    starts = []
    for part in parts:
        starts.append(first)
        first += part.shape[3]
    for kept in columns:
        for start, part in zip(starts, parts, strict=True):
            low, high = max(kept.start - start, 0), min(kept.stop - start, part.shape[3])
            if low < high or (kept.start == kept.stop and part is parts[0]):
                found.append(part[:, :, :, low : max(low, high)])
    return found
