"""Retrieval attention: one softmax over sink tokens, retrieved chunks and the local window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from memlong.bank.store.copying import to_device
from memlong.decoder.arrays import Bools, Ints
from memlong.decoder.kv.overlap import Arrival
from memlong.decoder.kv.window import LocalWindow
from memlong.decoder.model import kernels
from memlong.decoder.model.gates import MemoryGates
from memlong.decoder.model.kernels import Attend, Output
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.model.rope import AngleCache


@dataclass(frozen=True)
class Memory:
    """What the rows of a batch have retrieved, ready to be attended to.

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
        Where the keys are still to be rotated to; None if they are rotated.
    arrival
        When all of these are there, if they are still on their way to a CUDA device.
    """

    positions: Ints
    valid: Bools
    layers: tuple[tuple[int, ...], ...]
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    angles: AngleCache | None = None
    arrival: Arrival | None = None

    @property
    def tokens(self) -> int:
        """Retrieved tokens of a row, padding included."""
        return int(self.positions.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are not in the window yet."""
        return sum(states.nbytes for states in (*self.keys, *self.values))

    @cached_property
    def places(self) -> dict[int, tuple[int, int]]:
        """By retrieval layer: its group, and its place there."""
        return {
            layer: (number, place)
            for number, group in enumerate(self.layers)
            for place, layer in enumerate(group)
        }

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, kv_heads, tokens, head_dim] of a retrieval layer, if the window does not hold them."""
        number, place = self.places[layer]
        return self.keys[number][:, place], self.values[number][:, place]

    def wait(self) -> None:
        """Let what the device computes from here on come after the memory's arrival."""
        if self.arrival is not None:
            self.arrival.wait()

    def given_to(self, window: LocalWindow) -> Memory:
        """Put keys and values into the window's buffers, and return what is left to know."""
        self.wait()
        window.hold_memory(self.keys, self.values, self.angles)
        return replace(self, keys=(), values=(), angles=None, arrival=None)

    def detach(self) -> Memory:
        """Return the same memory, as a constant."""
        keys, values = (tuple(states.detach() for states in each) for each in (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    def of_rows(self, rows: Sequence[int]) -> Memory:
        """Return the memory of these rows, which may come more than once."""
        numbers = np.asarray(rows, dtype=np.int64)
        keys, values = (tuple(states[list(rows)] for states in each) for each in (self.keys, self.values))
        return replace(
            self, positions=self.positions[numbers], valid=self.valid[numbers], keys=keys, values=values
        )


@dataclass
class AttentionPass:
    """What one forward call may see: the window, of which the last columns are its own tokens, and the memory.

    One rule covers sinks, memory and window alike: a token sees a key that is valid, not ahead of it and, in a
    sliding-window layer, nearer than that layer's window. A token always sees itself, so that padding yields no NaN.

    Parameters
    ----------
    layout
        What the model is made of.
    window
        Which tokens its columns hold, and where they stand.
    queries
        Columns of the call itself.
    memory
        What was retrieved, if anything was.
    gates
        What each head adds to its logits of memory, if anything.
    device
        Where the model is.
    """

    layout: ModelLayout
    window: LocalWindow
    queries: int
    memory: Memory | None
    gates: MemoryGates | None
    device: torch.device
    _latest: int = -1
    _masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict, repr=False)
    _sees_all: dict[tuple[object, ...], bool] = field(default_factory=dict, repr=False)

    def supply(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put the memory of a layer, if there is one, before its window [rows, heads, columns, width]."""
        self._latest = layer
        memory = self.memory
        if memory is None or layer not in memory.places:
            return keys, values
        if torch.is_grad_enabled():  # what has gradients is not written over
            memory.wait()
            retrieved, their_values = memory.of(layer)
            return torch.cat([retrieved, keys], dim=2), torch.cat([their_values, values], dim=2)
        if memory.keys:
            self.memory = memory.given_to(self.window)
        return self.window.with_memory(layer, keys.shape[2])

    def attend(
        self,
        base: Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: dict[str, Any],
    ) -> Output:
        """Attend to what the cache gave, or what the model made of it: [rows, kv_heads, (memory +) columns, width]."""
        layers = self.layout.readers[module]
        layer = layers[0] if len(layers) == 1 else self._latest
        gated = self.gates is not None and self._has_memory(layer)
        # Some models ask for the latest tokens alone, where only their logits are wanted.
        asking = query.shape[2]
        if not gated and self.sees_all(layer):
            plain = kernels.is_plain(base, options)
            if plain and (asking == 1 or kernels.prefers_no_mask(query)):
                return kernels.attend_to_all_before(query, key, value, options.get("scaling"))
            if asking == 1:
                return base(module, query, key, value, None, **{**options, "is_causal": False})
        mask = self.mask(layer, query.dtype)[:, :, -asking:]
        if gated:
            mask = self._gated(mask, layer)
        return kernels.attend_with_mask(base, module, query, key, value, mask, options)

    def _has_memory(self, layer: int) -> bool:
        return self.memory is not None and layer in self.memory.places

    def _kind(self, layer: int) -> tuple[object, ...]:
        """Equal for layers of which the same tokens see the same keys."""
        reach = self.window.held_by(layer).reach
        return reach, self.layout.layers[layer].sliding_window, self._has_memory(layer)

    def sees_all(self, layer: int) -> bool:
        """Whether each token of the call sees every key of memory and window up to its own, in every row."""
        kind = self._kind(layer)
        if kind not in self._sees_all:
            self._sees_all[kind] = self._is_lower_right(layer)
        return self._sees_all[kind]

    def _is_lower_right(self, layer: int) -> bool:
        held, memory = self.window.held_by(layer), self.memory
        if not held.valid.all():
            return False
        farthest = held.places.min()
        if self._has_memory(layer) and memory is not None:
            first = held.places[:, -self.queries]
            if not memory.valid.all() or (memory.positions.max(axis=1) > first).any():
                return False
            farthest = min(farthest, memory.positions.min())
        sliding_window = self.layout.layers[layer].sliding_window
        return sliding_window is None or int(held.places.max() - farthest) < sliding_window

    def mask(self, layer: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [rows, 1, queries, (memory +) keys], the same object for all layers that need the same."""
        kind = (*self._kind(layer), dtype)
        if kind not in self._masks:
            self._masks[kind] = self._build(layer, dtype)
        return self._masks[kind]

    def _gated(self, mask: Tensor, layer: int) -> Tensor:
        """Add a layer's gates to the memory's columns of a mask: [rows, heads, queries, memory + keys]."""
        gates, memory = cast("MemoryGates", self.gates), cast("Memory", self.memory)
        bias = gates.of(layer).to(mask.dtype)[None, :, None, None]
        local = mask[..., memory.tokens :].expand(-1, bias.shape[1], -1, -1)
        return torch.cat([mask[..., : memory.tokens] + bias, local], dim=-1)

    def _build(self, layer: int, dtype: torch.dtype) -> Tensor:
        held, sliding_window = self.window.held_by(layer), self.layout.layers[layer].sliding_window
        places, valid = held.places, held.valid
        if self._has_memory(layer) and self.memory is not None:
            places = np.concatenate([self.memory.positions, places], axis=1)
            valid = np.concatenate([self.memory.valid, valid], axis=1)
        keys = to_device(torch.from_numpy(places), self.device)
        queries = keys[:, -self.queries :, None]
        visible = queries >= keys[:, None]
        if not valid.all():
            visible &= to_device(torch.from_numpy(valid), self.device)[:, None]
        if sliding_window is not None:
            visible &= queries - keys[:, None] < sliding_window
        visible[:, :, -self.queries :].diagonal(dim1=1, dim2=2).fill_(True)  # a token sees itself
        return kernels.additive_mask(visible, dtype)
