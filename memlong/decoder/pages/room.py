"""Where retrieved chunks stay from one retrieval to the next: only what has changed is copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlong.decoder.arrays import Bools, Ints
from memlong.decoder.kv.buffers import LayerGroup, turned
from memlong.decoder.kv.sources import KvSource
from memlong.decoder.model.rope import AngleCache
from memlong.decoder.pages.choice import PageBudget, Sketch, energies, kept_channels, largest, sketched
from memlong.decoder.stream.retrieval import Block, Placed


@dataclass(eq=False)
class GroupRoom:
    """The chunks of alike layers, in slots, in float32.

    Attributes
    ----------
    keys, values
        [rows, layers, heads, tokens, width], keys rotated.
    sketch, scales
        As a `Sketch` has them, by slot [rows, layers, heads, slots, kept, ...].
    energies
        Of each channel, by slot [rows, layers, heads, slots, head_dim].
    channels
        Those of the sketch [rows, layers, heads, kept].
    """

    keys: Tensor
    values: Tensor
    sketch: Tensor
    scales: Tensor
    energies: Tensor
    channels: Tensor

    @cached_property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """The same memory as NumPy arrays: keys, values, channels, sketch without pages, and scales."""
        states = self.keys, self.values, self.channels, self.sketch.flatten(5), self.scales
        return tuple(each.numpy() for each in states)

    def of_rows(self, rows: Sequence[int]) -> GroupRoom:
        """Return a copy with these rows."""
        return GroupRoom(*(getattr(self, each.name)[list(rows)] for each in fields(self)))


@dataclass(frozen=True, eq=False)
class LayerRoom:
    """The chunks of one layer.

    Attributes
    ----------
    group
        Those of all alike layers.
    place
        Index of the layer.
    slots, tokens
        How many of them are in use, from the first one on.
    """

    group: GroupRoom
    place: int
    slots: int
    tokens: int

    @property
    def keys(self) -> Tensor:
        """Keys, rotated [rows, memory heads, tokens, width]."""
        return self.group.keys[:, self.place, :, : self.tokens]

    @property
    def values(self) -> Tensor:
        """Values [rows, memory heads, tokens, width]."""
        return self.group.values[:, self.place, :, : self.tokens]

    def sketch(self, heads: slice | None = None) -> Sketch:
        """Sketch of the heads that attend to memory, or some of them."""
        heads = slice(None) if heads is None else heads
        group, place = self.group, self.place
        return Sketch(
            group.channels[:, place, heads],
            group.sketch[:, place, heads, : self.slots],
            group.scales[:, place, heads, : self.slots],
        )


@dataclass(eq=False)
class Room:
    """Retrieved chunks of the rows of a batch, in any order, each in a slot of its own.

    Parameters
    ----------
    source
        What each retrieval layer makes of stored K-V.
    groups
        The layers that attend to memory.
    budget
        How they choose pages.
    rows
        Rows of the batch.
    """

    source: KvSource
    groups: Sequence[LayerGroup]
    budget: PageBudget
    rows: int
    _held: list[list[Placed]] = field(init=False)
    _rooms: list[GroupRoom] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._held = [[] for _ in range(self.rows)]

    @torch.no_grad()
    def hold(self, wanted: Sequence[Sequence[Placed]]) -> tuple[Ints, Bools]:
        """Hold exactly these chunks of each row, and write those that it does not hold yet.

        Returns
        -------
        tuple
            Positions and validity of all tokens [rows, tokens].
        """
        width = max(map(len, wanted))
        positions = np.zeros((self.rows, width, self.budget.chunk_size), dtype=np.int64)
        with torch.inference_mode(False):  # it is written to later, in whatever mode
            for row, chunks in enumerate(wanted):
                before, self._held[row] = self._held[row], []  # after a failure, all are written again
                self._held[row] = self._hold_row(row, before, chunks, width)
                positions[row, : len(chunks)] = np.reshape(
                    [where for _, where in self._held[row]], (-1, self.budget.chunk_size)
                )
        counts = np.array([[len(chunks) * self.budget.chunk_size] for chunks in wanted])
        return positions.reshape(self.rows, -1), np.arange(width * self.budget.chunk_size) < counts

    def _hold_row(
        self, row: int, before: Sequence[Placed], chunks: Sequence[Placed], width: int
    ) -> list[Placed]:
        """Write the chunks that are new to the first slots that are free, and return what each slot holds."""
        coming = {_name(each): each for each in chunks}
        slots: list[Placed | None] = [coming.pop(_name(held), None) for held in before[: len(chunks)]]
        slots += [None] * (len(chunks) - len(slots))
        free = [slot for slot, held in enumerate(slots) if held is None]
        new = list(coming.values())
        if new or len(before) != len(chunks):
            self._write(row, free, new, len(chunks), width)
        for slot, placed in zip(free, new, strict=True):
            slots[slot] = placed
        return [each for each in slots if each is not None]

    def _write(self, row: int, slots: Sequence[int], new: Sequence[Placed], count: int, width: int) -> None:
        """Write new chunks to these slots, and have the sketch agree with all ``count`` slots that are then in use."""
        size = self.budget.chunk_size
        if new:
            keys, values = (
                torch.cat([getattr(block, name) for block, _ in new], dim=2) for name in ("keys", "values")
            )
            angles = AngleCache(torch.from_numpy(np.concatenate([where for _, where in new]))[None])
        for number, group in enumerate(self.groups):
            if new:
                raw, mine = self.source.supply(group.layers, keys, values)
                rotated = turned(raw[None], angles.of(group.rope), group.rope.rotated)[0].float()
                mine = mine.float()
                room = self._room(number, rotated, mine, width)
                for place, slot in enumerate(slots):
                    here, there = _slot(place, size), _slot(slot, size)
                    room.keys[row, :, :, there] = rotated[:, :, here]
                    room.values[row, :, :, there] = mine[:, :, here]
                    room.energies[row, :, :, slot] = energies(rotated[:, :, here])
            elif count:
                room = self._rooms[number]
            else:
                continue
            channels = largest(room.energies[row, :, :, :count].sum(dim=2))
            before, room.channels[row] = room.channels[row].clone(), channels
            changed = (channels != before).any(dim=2).nonzero().tolist() if len(new) < count else ()
            for layer, head in changed:
                self._follow(room, (row, layer, head), before[layer, head], count)
            if new:
                few, scales = sketched(rotated, channels, self.budget)
                room.sketch[row, :, :, list(slots)] = few
                room.scales[row, :, :, list(slots)] = scales

    def _follow(self, room: GroupRoom, head: tuple[int, int, int], before: Tensor, count: int) -> None:
        """Have the sketch of a head, made of the channels ``before``, follow those that it has now."""
        channels, sketch, scales = room.channels[head], room.sketch[head], room.scales[head]
        same = channels[:, None] == before
        kept, places = same.any(dim=1), same.int().argmax(dim=1)
        sketch[:count], scales[:count] = sketch[:count, places], scales[:count, places]
        keys = room.keys[head][: count * self.budget.chunk_size]
        few, its_scales = sketched(keys[None, None], channels[~kept][None, None], self.budget)
        sketch[:count, ~kept], scales[:count, ~kept] = few[0, 0], its_scales[0, 0]

    def _room(self, number: int, keys: Tensor, values: Tensor, width: int) -> GroupRoom:
        """Return a group's room, with space for this many slots."""
        size, pages = self.budget.page_size, self.budget.chunk_size // self.budget.page_size
        held = self._rooms[number] if number < len(self._rooms) else None
        have = 0 if held is None else held.energies.shape[3]
        if held is not None and have >= width:
            return held
        slots = max(width, 2 * have)
        shape, tokens = (self.rows, *keys.shape[:2]), slots * self.budget.chunk_size
        kept = kept_channels(keys.shape[3])
        room = GroupRoom(
            keys.new_zeros(*shape, tokens, keys.shape[3]),
            values.new_zeros(*shape, tokens, values.shape[3]),
            keys.new_zeros(*shape, slots, kept, size, pages, dtype=torch.int8),
            keys.new_zeros(*shape, slots, kept, dtype=torch.float32),
            keys.new_zeros(*shape, slots, keys.shape[3]),
            torch.zeros(*shape, kept, dtype=torch.int64, device=keys.device),
        )
        if held is not None:
            used = have * self.budget.chunk_size
            room.keys[:, :, :, :used], room.values[:, :, :, :used] = held.keys, held.values
            room.sketch[:, :, :, :have], room.scales[:, :, :, :have] = held.sketch, held.scales
            room.energies[:, :, :, :have], room.channels = held.energies, held.channels
        self._rooms[number : number + 1] = [room]
        return room

    def held(self, row: int) -> list[Block]:
        """The chunks of a row, by slot."""
        return [block for block, _ in self._held[row]]

    def of(self, number: int, place: int, tokens: int) -> LayerRoom:
        """Return what a layer has: its group, its index there, and so many tokens, which are all slots in use."""
        return LayerRoom(self._rooms[number], place, tokens // self.budget.chunk_size, tokens)

    @torch.no_grad()
    def of_rows(self, rows: Sequence[int]) -> Room:
        """Return a room of its own for these rows, which may come more than once."""
        other = Room(self.source, self.groups, self.budget, len(rows))
        other._held = [list(self._held[row]) for row in rows]
        with torch.inference_mode(False):
            other._rooms = [room.of_rows(rows) for room in self._rooms]
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and sketches, for all slots that there is space for."""
        return sum(
            states.nbytes
            for room in self._rooms
            for states in (room.keys, room.values, room.sketch, room.scales)
        )


def _name(placed: Placed) -> tuple[int, int]:
    """Return what tells a chunk at its positions from others that are held or come at the same time."""
    return id(placed[0]), int(placed[1][0])


def _slot(number: int, size: int) -> slice:
    return slice(number * size, (number + 1) * size)
