"""Retrieval attention: one softmax over sink tokens, retrieved chunks and the local window.

transformers calls an attention function by name. ``memlong_sdpa`` and ``memlong_eager`` wrap the functions of the
same name: without memory at hand they call them as they are; during a forward pass of a
:class:`~memlong.decoder.MemoryDecoder` they put the retrieved K-V to the left of the local K-V, make the mask from
positions, and leave grouped-query attention, scaling, soft caps and learned sinks to the wrapped function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from memlong.decoder.gates import MemoryGates
from memlong.decoder.overlap import Arrival
from memlong.decoder.room import Room, few
from memlong.errors import UnsupportedModelError

BASES = ("sdpa", "eager")
"""Attention implementations of transformers that memory can be attached to."""

_SLOT = "_memlong_slot"

Output = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Memory:
    """What the rows of a batch have retrieved, rotated and ready to be attended to.

    Attributes
    ----------
    keys, values
        By retrieval layer: [rows, kv_heads, tokens, head_dim].
    positions
        [rows, tokens], int64.
    valid
        [rows, tokens], bool; False where a row has retrieved fewer tokens than another.
    arrival
        When all of these are there, if they are still on their way to a CUDA device.
    rooms
        By retrieval layer: memory and window side by side, where tokens come one by one. A memory's window only grows.
    """

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    positions: Tensor
    valid: Tensor
    arrival: Arrival | None = None
    rooms: dict[int, Room] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        states = sum(each.nbytes for each in (*self.keys.values(), *self.values.values()))
        return states + sum(room.nbytes for room in self.rooms.values())

    def beside(self, layer: int, key: Tensor, value: Tensor, new: int) -> tuple[Tensor, Tensor]:
        """Put a layer's memory to the left of the window's K-V, of which the last ``new`` columns are new."""
        width, count = self.positions.shape[1], key.shape[2] - new
        fresh, fresh_values = key[:, :, count:], value[:, :, count:]
        if not few(fresh):
            self.rooms.pop(layer, None)
            return torch.cat([self.keys[layer], key], dim=2), torch.cat([self.values[layer], value], dim=2)
        room = self.rooms.get(layer)
        if room is None or not room.has_space(width + key.shape[2]):
            self.rooms[layer] = room = Room.around(self.keys[layer], self.values[layer], key, value)
        return room.put(width + count, fresh, fresh_values)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the memory."""
        return (*self.keys.values(), *self.values.values(), self.positions, self.valid)

    def beside_another(self) -> Memory:
        """Return the same memory, to stand beside a window in which columns have moved."""
        return replace(self, rooms={})

    def wait(self) -> None:
        """Let what the device computes from here on come after the memory's arrival."""
        if self.arrival is not None:
            self.arrival.wait()

    def detach(self) -> Memory:
        """Return the same memory, as a constant."""
        keys = {layer: states.detach() for layer, states in self.keys.items()}
        values = {layer: states.detach() for layer, states in self.values.items()}
        return replace(self, keys=keys, values=values, rooms={})

    def of_rows(self, rows: Tensor) -> Memory:
        """Return the memory of these rows [n], which may come more than once."""
        self.wait()
        return Memory(
            {layer: states.index_select(0, rows) for layer, states in self.keys.items()},
            {layer: states.index_select(0, rows) for layer, states in self.values.items()},
            self.positions.index_select(0, rows),
            self.valid.index_select(0, rows),
        )


@dataclass
class AttentionPass:
    """What one forward call may see: positions and validity of every key, the memory, and its gates if there are any.

    One rule covers sinks, memory and window alike: a token sees a key that is valid, not ahead of it and, in a
    sliding-window layer, nearer than that layer's window. A token always sees itself, so that padding yields no NaN.
    """

    query_positions: Tensor
    key_positions: Tensor
    key_valid: Tensor
    memory: Memory | None
    gates: MemoryGates | None = None
    _masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict, repr=False)

    def mask(self, sliding_window: int | None, *, with_memory: bool, dtype: torch.dtype) -> Tensor:
        """Additive mask [rows, 1, queries, (memory +) keys], the same object for all layers that need the same."""
        kind = (sliding_window, with_memory, dtype)
        if kind not in self._masks:
            self._masks[kind] = self._build(sliding_window, with_memory, dtype)
        return self._masks[kind]

    def gated(self, mask: Tensor, layer: int) -> Tensor:
        """Add a layer's gates to the memory's columns of a mask: [rows, heads, queries, memory + keys]."""
        if self.gates is None or self.memory is None:
            return mask
        bias = self.gates.of(layer).to(mask.dtype)[None, :, None, None]
        width = self.memory.positions.shape[1]
        local = mask[..., width:].expand(-1, bias.shape[1], -1, -1)
        return torch.cat([mask[..., :width] + bias, local], dim=-1)

    def _build(self, sliding_window: int | None, with_memory: bool, dtype: torch.dtype) -> Tensor:
        positions, valid = self.key_positions, self.key_valid
        if with_memory and self.memory is not None:
            positions = torch.cat([self.memory.positions, positions], dim=1)
            valid = torch.cat([self.memory.valid, valid], dim=1)
        queries = self.query_positions[:, :, None]
        visible = (queries >= positions[:, None]) & valid[:, None]
        if sliding_window is not None:
            visible &= queries - positions[:, None] < sliding_window
        visible[:, :, -queries.shape[1] :].diagonal(dim1=1, dim2=2).fill_(True)  # a token sees itself
        hidden = torch.tensor(torch.finfo(dtype).min, dtype=dtype, device=visible.device)
        return torch.where(visible, torch.zeros_like(hidden), hidden)[:, None]


Attend = Callable[..., Output]
"""An attention function of transformers: (module, query, key, value, attention_mask, **options)."""


class AttentionSlot:
    """Stands on the attention modules of one model and decides what they attend to.

    Without a ``current`` pass, attention is the model's own.
    """

    def __init__(self) -> None:
        self.current: AttentionPass | None = None

    def attend(
        self,
        base: Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> Output:
        """Attend to the local K-V [rows, kv_heads, keys, head_dim] and to the memory of this layer, if there is one."""
        now = self.current
        if now is None:
            return base(module, query, key, value, attention_mask, **options)
        memory = now.memory if now.memory is not None and module.layer_idx in now.memory.keys else None
        if memory is not None:
            memory.wait()
            layer = cast("int", module.layer_idx)
            key, value = memory.beside(layer, key, value, query.shape[2])
        mask = now.mask(options.get("sliding_window"), with_memory=memory is not None, dtype=query.dtype)
        if memory is not None:
            mask = now.gated(mask, cast("int", module.layer_idx))
        return base(module, query, key, value, mask, **{**options, "is_causal": False})


def check_free(model: PreTrainedModel) -> None:
    """Refuse a model that has a memory already.

    Raises
    ------
    UnsupportedModelError
        If another decoder is attached to it.
    """
    if any(hasattr(module, _SLOT) for module in model.modules()):
        raise UnsupportedModelError(
            f"This {type(model).__name__} already has a memory attached: leave the other decoder's `with` block first, "
            "or use another copy of the model."
        )


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into evaluation mode, and every module back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def installed(slot: AttentionSlot, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put the slot on the modules, and leave them as they were."""
    modules = tuple(modules)
    for module in modules:
        setattr(module, _SLOT, slot)
    try:
        yield
    finally:
        for module in modules:
            delattr(module, _SLOT)


@contextmanager
def replaced_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's attention go through memlong, and give it back as it was.

    Raises
    ------
    UnsupportedModelError
        If the model's attention cannot be replaced, or is not one of ``BASES``.
    """
    before = model.config._attn_implementation  # noqa: SLF001 - transformers has no public getter
    if before not in BASES:
        raise UnsupportedModelError(
            f"{type(model).__name__} runs the attention implementation {before!r}; memory attaches to "
            f"{' and '.join(map(repr, BASES))}. Load it with attn_implementation='sdpa', or call "
            "model.set_attn_implementation('sdpa')."
        )
    name = f"memlong_{before}"
    AttentionInterface.register(name, partial(_attention, before))
    # Without a mask function of its own, an implementation silently gets no mask at all.
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    try:
        with _quiet():
            model.set_attn_implementation(name)
        if model.config._attn_implementation != name:  # noqa: SLF001 - where it cannot, transformers only warns
            raise UnsupportedModelError(
                f"{type(model).__name__} does not let its attention be replaced: it is not built on transformers' "
                "AttentionInterface. Use a model that is (Llama, Qwen, Mistral, Gemma, Phi, GPT-NeoX and most others)."
            )
        yield
    finally:
        if model.config._attn_implementation != before:  # noqa: SLF001
            model.set_attn_implementation(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Our error replaces transformers' warning about the same thing."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _attention(base: str, module: nn.Module, *tensors: Tensor | None, **options: Any) -> Output:
    if base == "eager":  # not in the mapping: each model file has its own
        function: Attend = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[base]
    slot: AttentionSlot | None = getattr(module, _SLOT, None)
    if slot is None:
        return function(module, *tensors, **options)
    return slot.attend(function, module, *tensors, **options)  # type: ignore[arg-type]
