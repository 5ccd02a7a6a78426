"""Retrieval attention: one softmax over sink tokens, retrieved chunks and the local window."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from memlong.bank.store.copying import to_device
from memlong.decoder.kv.window import LocalWindow
from memlong.decoder.model import kernels
from memlong.decoder.model.gates import MemoryGates
from memlong.decoder.model.kernels import Attend, Output
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.stream.batch_memory import BatchMemory


@dataclass
class AttentionPass:
    """What one forward call may see: the window, of which the last columns are its own tokens, and the memory.

    One rule covers sinks, memory and window alike: a token sees a key that is valid, not ahead of it and, in a
    sliding-window layer, nearer than that layer's window. A token always sees itself, so that padding yields no NaN.

    Parameters
    ----------
    model_layout
        The model's layers.
    window
        The local window.
    queries
        Columns of this call's own tokens.
    memory
        What was retrieved, or None.
    gates
        What each head adds to its logits of memory, or None.
    device
        The model's.
    """

    model_layout: ModelLayout
    window: LocalWindow
    queries: int
    memory: BatchMemory | None
    gates: MemoryGates | None
    device: torch.device
    _latest: int = -1
    _masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict, repr=False)
    _sees_all: dict[tuple[object, ...], bool] = field(default_factory=dict, repr=False)

    def add_memory(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put a layer's memory, if it has any, before its window's K-V [rows, heads, columns, width]."""
        self._latest = layer
        memory = self.memory
        if memory is None or layer not in memory.places:
            return keys, values
        if torch.is_grad_enabled():  # what has gradients is not overwritten
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
        """Attend to the cache's K-V, or what the model derived from it: [rows, kv_heads, (memory +) columns, width]."""
        layers = self.model_layout.readers[module]
        layer = layers[0] if len(layers) == 1 else self._latest
        gated = self.gates is not None and self._has_memory(layer)
        # Some models query with the latest tokens alone where only their logits are wanted.
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
        """Return a key that is equal for layers with the same visibility."""
        reach = self.window.columns_of(layer).reach
        return reach, self.model_layout.layers[layer].sliding_window, self._has_memory(layer)

    def sees_all(self, layer: int) -> bool:
        """Whether each token of the call sees every key of memory and window up to itself, in every row."""
        kind = self._kind(layer)
        if kind not in self._sees_all:
            self._sees_all[kind] = self._is_lower_right(layer)
        return self._sees_all[kind]

    def _is_lower_right(self, layer: int) -> bool:
        held, memory = self.window.columns_of(layer), self.memory
        if not held.valid.all():
            return False
        farthest = held.order.min()
        if self._has_memory(layer) and memory is not None:
            first = held.order[:, -self.queries]
            if not memory.valid.all() or (memory.positions.max(axis=1) > first).any():
                return False
            farthest = min(farthest, memory.positions.min())
        sliding_window = self.model_layout.layers[layer].sliding_window
        return sliding_window is None or int(held.order.max() - farthest) < sliding_window

    def mask(self, layer: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [rows, 1, queries, (memory +) keys], one object for all layers of the same visibility."""
        kind = (*self._kind(layer), dtype)
        if kind not in self._masks:
            self._masks[kind] = self._build(layer, dtype)
        return self._masks[kind]

    def _gated(self, mask: Tensor, layer: int) -> Tensor:
        """Add a layer's gates to the memory's columns of a mask: [rows, heads, queries, memory + keys]."""
        gates, memory = cast("MemoryGates", self.gates), cast("BatchMemory", self.memory)
        bias = gates.of(layer).to(mask.dtype)[None, :, None, None]
        local = mask[..., memory.tokens :].expand(-1, bias.shape[1], -1, -1)
        return torch.cat([mask[..., : memory.tokens] + bias, local], dim=-1)

    def _build(self, layer: int, dtype: torch.dtype) -> Tensor:
        held, sliding_window = self.window.columns_of(layer), self.model_layout.layers[layer].sliding_window
        places, valid = held.order, held.valid
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
