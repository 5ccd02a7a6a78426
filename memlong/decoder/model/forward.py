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
from memlong.decoder.kv.window import LocalWindow
from memlong.decoder.model import kernels
from memlong.decoder.model.gates import MemoryGates
from memlong.decoder.model.head_names import runs
from memlong.decoder.model.kernels import Attend, Output
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.model.notes import AttentionNotes
from memlong.decoder.pages.attention import COMPILED, attend_compiled, hide_others, page_mask
from memlong.decoder.pages.choice import PageBudget
from memlong.decoder.stream.batch_memory import BatchMemory
from memlong.errors import UnsupportedModelError

_BY_HEAD = ("s_aux", "position_bias")  # what some models give attention for each head


@dataclass(frozen=True)
class _Seen:
    """What some heads of a layer see: the window, and memory or not.

    ``heads`` are those of queries, None for all; ``held`` are the K-V heads among those that attend to memory.
    """

    layer: int
    memory: bool
    heads: slice | None = None
    held: slice | None = None


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
    budget
        How much of the memory a token attends to; None for all of it.
    notes
        Where to note how much attention retrieved tokens get; None for nowhere.
    """

    model_layout: ModelLayout
    window: LocalWindow
    queries: int
    memory: BatchMemory | None
    gates: MemoryGates | None
    device: torch.device
    budget: PageBudget | None = None
    notes: AttentionNotes | None = None
    _latest: int = -1
    _masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict, repr=False)
    _sees_all: dict[tuple[object, ...], bool] = field(default_factory=dict, repr=False)

    @cached_property
    def with_memory(self) -> tuple[Tensor, Tensor] | bool:
        """Whether all rows, or none, attend to retrieved chunks; if some do, indices of these and of the others."""
        if self.memory is None:
            return False
        some = self.memory.valid.any(axis=1)
        if some.all() or not some.any():
            return bool(some.all())
        held, others = (
            to_device(torch.from_numpy(np.flatnonzero(each)), self.device) for each in (some, ~some)
        )
        return held, others

    def add_memory(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put a layer's memory, if it has any, before its window's K-V [rows, heads, columns, width]."""
        self._latest = layer
        memory = self.memory
        if memory is None or layer not in memory.places or memory.room is not None:
            return keys, values
        if torch.is_grad_enabled():  # what has gradients is not overwritten
            memory.wait()
            heads = self._memory_heads(layer)
            both = zip(memory.of(layer), (keys, values), strict=True)
            keys, values = (torch.cat([_in_place(mine, local, heads), local], dim=2) for mine, local in both)
            return keys, values
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
        heads = self._memory_heads(layer)
        if self.notes is not None and self.window.group_of(layer)[0].group.has_memory:
            self.notes.ask(layer, query.shape[1], query.shape[2])
        seen = _Seen(layer, self._has_memory(layer))
        if seen.memory and self.budget is not None:
            self._require_plain(base, module, options)
            if self._is_compiled(seen, query):
                return self._attend_compiled(query, key, value, options.get("scaling"), seen, heads), None
        if not heads:
            return self._attend(base, module, query, key, value, options, seen)
        memory = cast("BatchMemory", self.memory)
        odd = [name for name in _BY_HEAD if options.get(name) is not None]
        if odd:
            raise UnsupportedModelError(
                f"retrieval_heads must be 'all' for {type(module).__name__}, whose attention has {odd[0]}"
            )
        outputs = []
        group = query.shape[1] // key.shape[1]
        for run, sees_memory in _all_runs(heads, key.shape[1]):
            queries = slice(run.start * group, run.stop * group)
            first = 0 if sees_memory else memory.columns
            held = heads.index(run.start) if sees_memory else 0
            output, _ = self._attend(
                base,
                module,
                query[:, queries],
                key[:, run, first:],
                value[:, run, first:],
                options,
                _Seen(layer, sees_memory, queries, slice(held, held + run.stop - run.start)),
            )
            outputs.append(output)
        return torch.cat(outputs, dim=2), None

    def _attend(
        self,
        base: Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: dict[str, Any],
        seen: _Seen,
    ) -> Output:
        """Attend with heads that all see memory, or all do not."""
        if seen.memory and self.budget is not None:
            return self._attend_to_pages(base, module, query, key, value, options, seen, self.budget)
        output, weights = self._attend_to_all(base, module, query, key, value, options, seen)
        if self.notes is not None and seen.memory:
            self._note(base, module, query, key, options, seen, weights)
        return output, weights

    def _attend_to_all(
        self,
        base: Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: dict[str, Any],
        seen: _Seen,
    ) -> Output:
        gated = self.gates is not None and seen.memory
        # Some models query with the latest tokens alone where only their logits are wanted.
        asking = query.shape[2]
        if not gated and self.sees_all(seen):
            plain = kernels.is_plain(base, options)
            if plain and (asking == 1 or kernels.prefers_no_mask(query)):
                return kernels.attend_to_all_before(query, key, value, options.get("scaling"))
            if asking == 1:
                return base(module, query, key, value, None, **{**options, "is_causal": False})
        return kernels.attend_with_mask(
            base, module, query, key, value, self._mask_for(seen, query.dtype, asking), options
        )

    def _require_plain(self, base: Attend, module: nn.Module, options: dict[str, Any]) -> None:
        if not kernels.is_plain(base, options):
            raise UnsupportedModelError(
                f"attended_tokens must be None for the attention of this {type(module).__name__}, which is more than "
                f"torch's softmax of products: it has {kernels.beyond_sdpa(options) or 'another implementation'}"
            )

    def _is_compiled(self, seen: _Seen, query: Tensor) -> bool:
        memory = cast("BatchMemory", self.memory)
        return memory.room is not None and query.dtype in COMPILED and self.sees_all(seen)

    def _attend_compiled(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        seen: _Seen,
        heads: Sequence[int],
    ) -> Tensor:
        """Attend to the window, and with these heads, or all, to pages of the memory."""
        memory, budget = cast("BatchMemory", self.memory), cast("PageBudget", self.budget)
        asking = query.shape[2]
        mask = None
        if asking > 1:
            mask = self._mask(replace(seen, memory=False), query.dtype)[:, :, -asking:]
        gates = None if self.gates is None else self._gates_of(seen)
        held = memory.held(seen.layer)
        output, chosen = attend_compiled(query, (key, value), held, heads, budget, scale, mask, gates)
        if self.notes is not None:
            self._note_pages(query, key, held.keys, scale, seen, heads, chosen)
        return output

    def _attend_to_pages(
        self,
        base: Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: dict[str, Any],
        seen: _Seen,
        budget: PageBudget,
    ) -> Output:
        """Attend to pages of the memory through a mask, with heads that all see it."""
        memory = cast("BatchMemory", self.memory)
        if memory.room is not None:
            held, heads = memory.held(seen.layer), slice(None) if seen.held is None else seen.held
            key, value = (
                torch.cat([mine[:, heads].to(local.dtype), local], dim=2)
                for mine, local in ((held.keys, key), (held.values, value))
            )
            sketch = held.sketch(seen.held)
        else:
            first = 0 if seen.heads is None else seen.heads.start
            sketch = memory.sketch(seen.layer, first, key[:, :, : memory.tokens], budget)
        mask = self._mask_for(seen, query.dtype, query.shape[2])
        mask = page_mask(query, key, sketch, budget, options.get("scaling"), mask)
        if self.notes is not None:
            self.notes.give_by_softmax(seen.layer, query, [key], mask, options.get("scaling"), memory.tokens)
        return kernels.attend_with_mask(base, module, query, key, value, mask, options)

    def _note(
        self,
        base: Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        options: dict[str, Any],
        seen: _Seen,
        weights: Tensor | None,
    ) -> None:
        """Note what retrieved tokens get, by the weights of attention or, where it gives none, by their softmax."""
        notes, memory = cast("AttentionNotes", self.notes), cast("BatchMemory", self.memory)
        if weights is not None and weights.shape == (*query.shape[:3], key.shape[2]):
            notes.give(seen.layer, weights[..., : memory.tokens])
        elif weights is None and kernels.is_plain(base, options):
            mask = self._mask_for(seen, query.dtype, query.shape[2])
            notes.give_by_softmax(seen.layer, query, [key], mask, options.get("scaling"), memory.tokens)
        else:
            odd = kernels.beyond_sdpa(options) or "an implementation of its own"
            raise UnsupportedModelError(
                f"sources() cannot tell what the attention of this {type(module).__name__} gives to memory: it is more "
                f"than torch's softmax of products ({odd}), and returns no weights. Load the model with "
                "attn_implementation='eager', or generate outside `with decoder.sources():`"
            )

    def _note_pages(
        self,
        query: Tensor,
        key: Tensor,
        memory: Tensor,
        scale: float | None,
        seen: _Seen,
        heads: Sequence[int],
        chosen: Tensor | None,
    ) -> None:
        """Note what retrieved tokens get of these heads, or all, each query of which has ``chosen`` pages, or all."""
        notes, budget = cast("AttentionNotes", self.notes), cast("PageBudget", self.budget)
        group = query.shape[1] // key.shape[1]
        mask = self._mask_for(seen, torch.float32, query.shape[2])
        if heads:
            query, key = query.unflatten(1, (-1, group))[:, heads].flatten(1, 2), key[:, heads]
            if mask.shape[1] > 1:
                mask = mask.unflatten(1, (-1, group))[:, heads].flatten(1, 2)
        if chosen is not None:
            pages = memory.shape[2] // budget.page_size
            mask = hide_others(mask, chosen, pages, budget.page_size, group)
        notes.give_by_softmax(seen.layer, query, [memory, key], mask, scale, memory.shape[2])

    def _has_memory(self, layer: int) -> bool:
        return self.memory is not None and layer in self.memory.places

    def _memory_heads(self, layer: int) -> tuple[int, ...]:
        """K-V heads that attend to memory, ascending; none if all do, or there is no memory."""
        return self.window.group_of(layer)[0].group.heads if self._has_memory(layer) else ()

    def _kind(self, seen: _Seen) -> tuple[object, ...]:
        """Return a key that is equal where visibility is the same."""
        reach = self.window.columns_of(seen.layer).reach
        return reach, self.model_layout.layers[seen.layer].sliding_window, seen.memory

    def sees_all(self, seen: _Seen) -> bool:
        """Whether each token of the call sees every key of memory and window up to itself, in every row."""
        kind = self._kind(seen)
        if kind not in self._sees_all:
            self._sees_all[kind] = self._is_lower_right(seen)
        return self._sees_all[kind]

    def _is_lower_right(self, seen: _Seen) -> bool:
        held, memory = self.window.columns_of(seen.layer), self.memory
        if not held.valid.all():
            return False
        farthest = held.order.min()
        if seen.memory and memory is not None:
            first = held.order[:, -self.queries]
            if not memory.valid.all() or (memory.positions.max(axis=1) > first).any():
                return False
            farthest = min(farthest, memory.positions.min())
        sliding_window = self.model_layout.layers[seen.layer].sliding_window
        return sliding_window is None or int(held.order.max() - farthest) < sliding_window

    def _mask(self, seen: _Seen, dtype: torch.dtype) -> Tensor:
        """Additive mask [rows, 1, queries, (memory +) keys], one object for all layers of the same visibility."""
        kind = (*self._kind(seen), dtype)
        if kind not in self._masks:
            self._masks[kind] = self._build(seen, dtype)
        return self._masks[kind]

    def _mask_for(self, seen: _Seen, dtype: torch.dtype, queries: int) -> Tensor:
        """Mask [rows, 1 or heads, queries, (memory +) keys] of the latest queries, with gates where there are any."""
        mask = self._mask(seen, dtype)[:, :, -queries:]
        return mask if self.gates is None or not seen.memory else self._gated(mask, seen)

    def _gated(self, mask: Tensor, seen: _Seen) -> Tensor:
        """Add a layer's gates to the memory's columns of a mask: [rows, heads, queries, memory + keys]."""
        memory = cast("BatchMemory", self.memory)
        bias = self._gates_of(seen).to(mask.dtype)[None, :, None, None]
        local = mask[..., memory.tokens :].expand(-1, bias.shape[1], -1, -1)
        return torch.cat([mask[..., : memory.tokens] + bias, local], dim=-1)

    def _gates_of(self, seen: _Seen) -> Tensor:
        gates = cast("MemoryGates", self.gates).of(seen.layer)
        return gates if seen.heads is None else gates[seen.heads]

    def _build(self, seen: _Seen, dtype: torch.dtype) -> Tensor:
        held = self.window.columns_of(seen.layer)
        sliding_window = self.model_layout.layers[seen.layer].sliding_window
        places, valid = held.order, held.valid
        if seen.memory and self.memory is not None:
            places = np.concatenate([self.memory.positions, places], axis=1)
            valid = np.concatenate([self.memory.valid, valid], axis=1)
        rows = len(places)
        if (places == places[:1]).all() and (
            valid == valid[:1]
        ).all():  # as usual in training: one mask for all
            places, valid = places[:1], valid[:1]
        keys = to_device(torch.from_numpy(places), self.device)
        queries = keys[:, -self.queries :, None]
        visible = queries >= keys[:, None]
        if not valid.all():
            visible &= to_device(torch.from_numpy(valid), self.device)[:, None]
        if sliding_window is not None:
            visible &= queries - keys[:, None] < sliding_window
        visible[:, :, -self.queries :].diagonal(dim1=1, dim2=2).fill_(True)  # a token sees itself
        return kernels.additive_mask(visible, dtype).expand(rows, -1, -1, -1)


def _all_runs(heads: tuple[int, ...], count: int) -> list[tuple[slice, bool]]:
    """Return the stretches of these heads, and of the others, of ``count`` in all, in order."""
    others = [head for head in range(count) if head not in heads]
    both = [(run, True) for run in runs(heads)] + [(run, False) for run in runs(others)]
    return sorted(both, key=lambda each: each[0].start)


def _in_place(states: Tensor, like: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Put memory [rows, memory heads, tokens, width] where its heads are among all, which otherwise have zeros."""
    if not heads:
        return states
    rows, count, _, width = like.shape
    where = to_device(torch.tensor(heads, device="cpu"), states.device)
    return states.new_zeros(rows, count, states.shape[2], width).index_copy(1, where, states)
