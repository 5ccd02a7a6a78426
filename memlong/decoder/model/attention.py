"""Hooking a model's attention: a slot set on its attention modules decides what they attend to.

transformers calls an attention function by name. ``memlong_sdpa`` and ``memlong_eager`` wrap the functions of the
same name: outside a forward pass of a `MemoryDecoder` they just call them; during one, the pass
(`memlong.decoder.model.forward`) decides.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from memlong.bank.forks import free_after_fork
from memlong.decoder.interrupts import uninterrupted
from memlong.decoder.model.kernels import Attend, Output
from memlong.decoder.stream.attention_record import AttentionRecord
from memlong.errors import MemlongError, UnsupportedModelError

BASES = ("sdpa", "eager")
"""Attention implementations of transformers that memory attaches to."""

_SLOT = "_memlong_slot"
_OURS = "memlong_"

Visibility = Callable[..., Any]
"""A mask function of transformers: (row, head, query, key) as indices, to whether the query sees the key."""

_masks_seen: ContextVar[list[tuple[Tensor, Visibility]] | None] = ContextVar("masks_seen", default=None)


class Attending(Protocol):
    """A forward pass that decides what to attend to."""

    @property
    def with_memory(self) -> tuple[Tensor, Tensor] | bool:
        """Whether all rows, or none, attend to retrieved chunks; if some do, indices of these and of the others."""

    def attend(
        self,
        base: Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: dict[str, Any],
    ) -> Output:
        """Attend to the local K-V [rows, kv_heads, keys, head_dim], and to the pass's memory."""


class AttentionSlot:
    """Set on the attention modules of one model; decides what they attend to.

    Without a ``current`` pass, attention is the model's own; other threads are never affected by this one's pass.

    Attributes
    ----------
    modules
        The modules, by identity: a copy of the model has copies of them.
    reading
        Held while a segment is read or streams are saved: other threads wait.
    record
        Where to record what retrieved chunks get of the attention of tokens that count; None for nowhere.
    adapters
        The adapters' layers that act on rows with memory alone, by identity; None if adapters act on all.
    """

    def __init__(self) -> None:
        self.modules: frozenset[int] = frozenset()
        self._here = threading.local()
        self.reading = free_after_fork(threading.RLock())
        self.record: AttentionRecord | None = None
        self.adapters: frozenset[int] | None = None

    def __reduce__(self) -> tuple[type[AttentionSlot], tuple[()]]:
        return AttentionSlot, ()  # on a copy of the model, which has no memory

    @property
    def current(self) -> Attending | None:
        """The pass of this thread."""
        return getattr(self._here, "current", None)

    @current.setter
    def current(self, attending: Attending | None) -> None:
        self._here.current = attending

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
        """Let the current pass attend; transformers' mask does not cover memory."""
        current = self.current
        if current is None:
            return base(module, query, key, value, attention_mask, **options)
        return current.attend(base, module, query, key, value, options)


def check_free(model: PreTrainedModel) -> None:
    """Refuse a model that already has a memory.

    Raises
    ------
    UnsupportedModelError
        If another decoder is attached to it.
    """
    if any(_slot_of(module) is not None for module in model.modules()):
        raise UnsupportedModelError(
            f"This {type(model).__name__} already has a memory attached: leave the other decoder's `with` block first, "
            "or use another copy of the model"
        )


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into evaluation mode, and restore every module's mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        with uninterrupted():
            for module, training in modes:
                module.training = training


@contextmanager
def installed(slot: AttentionSlot, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Set the slot on the modules, and remove it again."""
    modules = tuple(modules)
    try:
        slot.modules = frozenset(map(id, modules))
        for module in modules:
            setattr(module, _SLOT, slot)
        yield
    finally:
        with uninterrupted():
            slot.modules = frozenset()
            for module in modules:
                vars(module).pop(_SLOT, None)


@contextmanager
def masks_noted() -> Iterator[list[tuple[Tensor, Visibility]]]:
    """Record each mask that transformers makes for memlong's attention, and its mask function."""
    seen: list[tuple[Tensor, Visibility]] = []
    token = _masks_seen.set(seen)
    try:
        yield seen
    finally:
        _masks_seen.reset(token)


@contextmanager
def replaced_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's attention go through memlong, and restore it.

    Raises
    ------
    UnsupportedModelError
        If the model's attention cannot be replaced, or is not one of ``BASES``.
    """
    config = text_config(model)
    before = attention_of(model)
    if before not in BASES:
        raise UnsupportedModelError(
            f"{type(model).__name__} runs the attention implementation {before!r}; memory attaches to "
            f"{' and '.join(map(repr, BASES))}. Load it with attn_implementation='sdpa', or call "
            "model.set_attn_implementation('sdpa')"
        )
    name = _OURS + before
    AttentionInterface.register(name, partial(_attention, before))
    # Without a mask function of its own, an implementation silently gets no mask at all.
    AttentionMaskInterface.register(name, partial(_mask, ALL_MASK_ATTENTION_FUNCTIONS[before]))
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    parts = [  # a tower may have its own
        (part, _implementation(part).removeprefix(_OURS)) for part in (*configs.values(), config)
    ]
    try:
        with _quiet(), suppress(ValueError):  # of a tower that knows no other attention
            model.set_attn_implementation(name)
        if _implementation(config) != name:  # where it cannot, transformers only warns
            raise UnsupportedModelError(
                f"{type(model).__name__} does not let its attention be replaced: it is not built on transformers' "
                "AttentionInterface. Use a model that is (Llama, Qwen, Mistral, Gemma, Phi, GPT-NeoX and most others)"
            )
        yield
    finally:
        with uninterrupted():
            for part, own in parts:
                if _implementation(part) != own:
                    part._attn_implementation = own  # noqa: SLF001 - transformers has no public setter


def attention_of(model: PreTrainedModel) -> str:
    """Return the name of the model's own attention implementation, whether a memory is attached or not."""
    return _implementation(text_config(model)).removeprefix(_OURS)


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the configuration of the decoder that text goes through."""
    return model.config.get_text_config(decoder=True)


def check_attached(model: PreTrainedModel) -> None:
    """Refuse a model whose attention does not go through memlong.

    Raises
    ------
    MemlongError
        If its attention implementation was changed since a memory was attached.
    """
    now = _implementation(text_config(model))
    if not now.startswith(_OURS):
        raise MemlongError(
            f"The model's attention implementation is {now!r}: it was changed inside `with decoder:`, so that it no "
            "longer goes through the memory. Choose it before (attn_implementation='sdpa' or 'eager' at loading)"
        )


def _slot_of(module: nn.Module) -> AttentionSlot | None:
    slot: AttentionSlot | None = getattr(module, _SLOT, None)
    return slot if slot is not None and id(module) in slot.modules else None


def _implementation(config: PreTrainedConfig) -> str:
    return config._attn_implementation  # type: ignore[no-any-return] # noqa: SLF001 - transformers has no public getter


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
    slot = _slot_of(module)
    if slot is None:
        return function(module, *tensors, **options)
    return slot.attend(function, module, *tensors, **options)  # type: ignore[arg-type]


def _mask(base: Callable[..., Tensor | None], **options: Any) -> Tensor | None:
    seen = _masks_seen.get()
    if seen is None:
        return base(**options)
    mask = base(**{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    if mask is not None:
        seen.append((mask, options["mask_function"]))
    return mask
