"""Retrieved K-V of all rows as one batch: on the model's device, with keys rotated to their positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from memlong.bank.store.copying import to_device
from memlong.decoder.arrays import Bools, Ints
from memlong.decoder.kv.buffers import LayerGroup, turned
from memlong.decoder.kv.copy_stream import CopyEvent, CopyStream
from memlong.decoder.kv.sources import KvSource
from memlong.decoder.kv.window import LocalWindow
from memlong.decoder.model.rope import AngleCache
from memlong.decoder.pages.choice import PageBudget, Sketch
from memlong.decoder.pages.room import LayerRoom, Room
from memlong.decoder.stream.retrieval import Block, StreamMemory, joined_states
from memlong.decoder.stream.token_stream import TokenStream


@dataclass(frozen=True)
class BatchMemory:
    """What the rows of a batch have retrieved, ready for attention.

    Attributes
    ----------
    positions
        [rows, tokens], on the host.
    valid
        [rows, tokens], on the host; False where a row has retrieved fewer tokens than another.
    layers
        By group of retrieval layers, the layers.
    keys, values
        By group of retrieval layers: [rows, layers, kv_heads, tokens, head_dim]. Empty once the window holds them.
    angles
        What the keys are still to be rotated by; None if they are rotated.
    ready
        The event after which all of these may be used, if they are still being copied to a CUDA device.
    sketches
        By layer and first query head, what tokens choose pages by; made when first needed.
    room
        Where keys and values are, if they stay from one retrieval to the next.
    made_of
        What each row had retrieved.
    """

    positions: Ints
    valid: Bools
    layers: tuple[tuple[int, ...], ...]
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    angles: AngleCache | None = None
    ready: CopyEvent | None = None
    sketches: dict[tuple[int, int], Sketch] = field(default_factory=dict, compare=False, repr=False)
    room: Room | None = None
    made_of: tuple[StreamMemory | None, ...] = ()

    @property
    def tokens(self) -> int:
        """Retrieved tokens of a row, padding included."""
        return int(self.positions.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are not in the window."""
        held = 0 if self.room is None else self.room.nbytes
        return held + sum(states.nbytes for states in (*self.keys, *self.values))

    @property
    def columns(self) -> int:
        """Columns that the window needs for it."""
        return 0 if self.room is not None else self.tokens

    @cached_property
    def places(self) -> dict[int, tuple[int, int]]:
        """By retrieval layer: its group, and its index there."""
        return {
            layer: (number, place)
            for number, group in enumerate(self.layers)
            for place, layer in enumerate(group)
        }

    def order(self, row: int) -> list[int]:
        """Which of the chunks that a row has retrieved stand in its columns, one after the other."""
        memory = self.made_of[row]
        blocks = () if memory is None else memory.blocks
        if self.room is None:
            return list(range(len(blocks)))
        number = {id(block): place for place, block in enumerate(blocks)}
        return [number[id(block)] for block in self.room.held(row)]

    def sketch(self, layer: int, first_head: int, keys: Tensor, budget: PageBudget) -> Sketch:
        """Return the sketch of some heads' keys [rows, kv_heads, tokens, head_dim], for which there is no room."""
        name = layer, first_head
        if name not in self.sketches:
            self.sketches[name] = Sketch.of(keys, budget)
        return self.sketches[name]

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, kv_heads, tokens, head_dim] of a retrieval layer, if the window does not hold them."""
        number, place = self.places[layer]
        keys, values = self._by_layer[number]
        return keys[place], values[place]

    @cached_property
    def _by_layer(self) -> tuple[tuple[tuple[Tensor, ...], ...], ...]:
        """Keys and values of each layer of a group; taken at once, as are then their gradients."""
        both = zip(self.keys, self.values, strict=True)
        return tuple((keys.unbind(dim=1), values.unbind(dim=1)) for keys, values in both)

    def held(self, layer: int) -> LayerRoom:
        """What the room holds for a layer."""
        assert self.room is not None  # noqa: S101 - the caller knows
        return self.room.of(*self.places[layer], self.tokens)

    def wait(self) -> None:
        """Make what the device computes from here on wait for the copy."""
        if self.ready is not None:
            self.ready.wait()

    def given_to(self, window: LocalWindow) -> BatchMemory:
        """Move keys and values into the window's buffers, and return the rest."""
        self.wait()
        window.hold_memory(self.keys, self.values, self.angles)
        return replace(self, keys=(), values=(), angles=None, ready=None)

    def detach(self) -> BatchMemory:
        """Return the same memory, as a constant."""
        keys, values = (tuple(states.detach() for states in each) for each in (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    def of_rows(self, rows: Sequence[int]) -> BatchMemory:
        """Return the memory of these rows, which may come more than once."""
        numbers = np.asarray(rows, dtype=np.int64)
        keys, values = (tuple(states[list(rows)] for states in each) for each in (self.keys, self.values))
        return replace(
            self,
            positions=self.positions[numbers],
            valid=self.valid[numbers],
            keys=keys,
            values=values,
            sketches={},
            room=None if self.room is None else self.room.of_rows(rows),
            made_of=tuple(self.made_of[row] for row in rows),
        )


class MemoryLoader:
    """Brings what the streams have retrieved to the model.

    Parameters
    ----------
    source
        What each retrieval layer makes of stored K-V.
    groups
        The layers that attend to memory, grouped as the window has them.
    device
        The model's.
    new_room
        Makes a room for so many rows; None if the window holds what is retrieved.

    Attributes
    ----------
    copy_stream
        Where a CUDA device copies while it computes.
    """

    def __init__(
        self,
        source: KvSource,
        groups: Sequence[LayerGroup],
        device: torch.device,
        new_room: Callable[[int], Room] | None = None,
    ) -> None:
        self._source = source
        self._groups = groups
        self._layers = tuple(group.layers for group in groups)
        self._device = device
        self._new_room = new_room
        self.copy_stream = CopyStream(device)

    def load(
        self, streams: Sequence[TokenStream], before: BatchMemory | None, *, gradients: bool
    ) -> BatchMemory | None:
        """Return the memory of these streams, one for each row; None if no row has retrieved anything.

        It may take over the room of the memory ``before``, which is then no longer of use.
        """
        if self._new_room is not None and not gradients:
            if not any(stream.memory for stream in streams):
                return None
            room = before.room if before else None
            room = room or self._new_room(len(streams))
            held = room.hold([stream.placed_blocks() for stream in streams])
            made_of = tuple(stream.memory for stream in streams)
            return BatchMemory(*held, self._layers, room=room, made_of=made_of)
        if gradients:  # on the model's stream: gradients of one leaf are best made on one stream
            self.copy_stream.join()
            with torch.enable_grad():
                return self._assemble(streams)
        if not self.copy_stream.is_available:
            return self._assemble(streams, rotate=False)  # the window's buffers take them un-rotated
        with self.copy_stream.active():
            memory = self._assemble(streams)
        if memory is None:
            return None
        return replace(memory, ready=self.copy_stream.record((*memory.keys, *memory.values)))

    def _assemble(self, streams: Sequence[TokenStream], *, rotate: bool = True) -> BatchMemory | None:
        """Batch the rows' retrieved K-V, pad shorter ones, and rotate keys to their positions."""
        memories = [stream.memory for stream in streams]
        if not any(memories):
            return None
        each = [stream.memory_positions() for stream in streams]
        lengths = [len(mine) for mine in each]
        width = max(lengths)
        positions = np.stack([np.pad(mine, (0, width - len(mine))) for mine in each])
        valid = np.arange(width) < np.array(lengths)[:, None]
        angles = AngleCache(to_device(torch.from_numpy(positions), self._device))
        if torch.is_grad_enabled():
            memories = [self._made_again(stream) for stream in streams]
        blocks = [block for memory in memories if memory for block in memory.blocks]
        joined = [joined_states([getattr(block, side) for block in blocks]) for side in ("keys", "values")]
        keys, values = [], []
        for group in self._groups:
            supplied = self._source.supply(group.layers, *joined)
            raw, mine = (_by_row(states, lengths).to(self._device) for states in supplied)
            keys.append(turned(raw, angles.of(group.rope), group.rope.rotated) if rotate else raw)
            values.append(mine)
        late = None if rotate else angles
        made_of = tuple(stream.memory for stream in streams)
        return BatchMemory(positions, valid, self._layers, tuple(keys), tuple(values), late, made_of=made_of)

    def _made_again(self, stream: TokenStream) -> StreamMemory | None:
        """Return what a stream has retrieved, with the stored form of its latest chunks made again, for gradients."""
        memory = stream.memory
        if memory is None or not stream.latest:
            return memory
        found = {each: stream.latest[each] for each in stream.latest.keys() & set(memory.ids)}
        made = {each: Block(*self._source.stored(raw.keys, raw.values)) for each, raw in found.items()}
        return memory.with_blocks(made)


def _by_row(states: Tensor, lengths: Sequence[int]) -> Tensor:
    """[layers, heads, tokens of all rows, width] -> [rows, layers, heads, tokens of a row, width], padded with 0."""
    layers, heads, _, width = states.shape
    if min(lengths) == max(lengths):
        even: Tensor = states.unflatten(2, (len(lengths), -1))
        return even.permute(2, 0, 1, 3, 4)
    batch: Tensor = states.new_zeros(len(lengths), layers, heads, max(lengths), width)
    for row, part in enumerate(states.split(list(lengths), dim=2)):
        batch[row, :, :, : lengths[row]] = part
    return batch
