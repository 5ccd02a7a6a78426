"""peft's adapters inside a model: which are active, and which tensors are theirs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from memlong.decoder.model.attention import AttentionSlot
from memlong.decoder.model.replacing import replaced
from memlong.errors import MemlongError, UnsupportedModelError

_INSIDE = ("base_layer", "original_module", "token_adapter")  # how peft's layers name what they are around
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Settings ``init_lora_weights`` of LoRA that leave the weights of the model as they are."""

_OUTSIDE = ("POLY", "XLORA")  # kinds whose forward pass is that of the PeftModel alone


@dataclass(frozen=True)
class AdapterLayer:
    """One adapter's part in one layer.

    Attributes
    ----------
    adapter
        Name of the adapter.
    path, layer
        Name of the layer in the model, and its type without adapters.
    scaling
        Factor of the adapter's output; None if this kind of adapter has none.
    tensors
        The adapter's weights, by their names in the layer.
    """

    adapter: str
    path: str
    layer: str
    scaling: float | None
    tensors: Mapping[str, Tensor]


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a ``PeftModel``, where its adapters stay; any other model unchanged.

    Raises
    ------
    UnsupportedModelError
        If an active adapter works outside the layers, for instance by prepending learned tokens to the prompt.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        return cast("PreTrainedModel", model)
    active = [model.active_adapter] if isinstance(model.active_adapter, str) else model.active_adapter
    for name in active:
        config: Any = model.peft_config[name]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning or config.is_adaption_prompt or kind in _OUTSIDE:
            raise UnsupportedModelError(
                f"The adapter {name!r} is of the kind {kind}, which works outside the model's layers, and memory "
                "sees only the model. Use an adapter of the layers (LoRA, DoRA, IA3, ...), or the plain model"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise UnsupportedModelError(
                f"The adapter {name!r} is an activated LoRA, active only after its invocation tokens, which memory "
                "does not look for. Use a LoRA without alora_invocation_tokens, or the plain model"
            )
    return cast("PreTrainedModel", model.base_model.model)


def own_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return, for each tensor of a model's state that is not an adapter's, its name without adapters."""
    around = {path for path, _ in _wrappers(model)}
    return {name: plain for name in names if (plain := _without(name, around)) is not None}


def active_layers(model: nn.Module) -> Iterator[AdapterLayer]:
    """Yield what each active adapter does; a merged one is part of the model's weights instead."""
    wrappers = _wrappers(model)
    around = {path for path, _ in wrappers}
    for path, wrapper in wrappers:
        if wrapper.disable_adapters or wrapper.merged_adapters:
            continue
        for adapter, theirs in _own_tensors(wrapper).items():
            if theirs:
                scaling = getattr(wrapper, "scaling", None)
                yield AdapterLayer(
                    adapter,
                    path,
                    _without(f"{path}.base_layer", around) or path,
                    scaling.get(adapter) if isinstance(scaling, dict) else None,
                    theirs,
                )


@contextmanager
def acting_with_memory(model: PreTrainedModel, slot: AttentionSlot) -> Iterator[None]:
    """Let a model's adapters act only on rows that attend to retrieved chunks in the slot's pass.

    Raises
    ------
    UnsupportedModelError
        If an active adapter is part of the model's weights, has changed them, or is no layer around another.
    """
    wrappers = dict(_wrappers(model))
    for path, wrapper in wrappers.items():
        if odd := _why_always(model, wrapper):
            raise UnsupportedModelError(
                f"adapter_for must be 'all' for this {type(model).__name__}, as its adapter at {path!r} cannot be left "
                f"out of a forward call: it {odd}"
            )
    with ExitStack() as changes:
        around = {path: wrapper for path, wrapper in wrappers.items() if hasattr(wrapper, "base_layer")}
        for path, wrapper in around.items():
            if not any(path.startswith(f"{other}.") for other in around):
                acting = _WithMemory(wrapper, wrapper.forward, path, slot)
                changes.enter_context(replaced(wrapper, "forward", acting))
        changes.enter_context(_noted(slot, frozenset(map(id, wrappers.values()))))
        yield


def check_acting(model: PreTrainedModel, slot: AttentionSlot) -> None:
    """Refuse a model whose adapters were changed since they act on rows with memory alone.

    Raises
    ------
    MemlongError
        If a layer of an adapter was added, taken away or merged, or one that always acts was activated.
    """
    if slot.adapters is None:
        return
    wrappers = _wrappers(model)
    if {id(wrapper) for _, wrapper in wrappers} != slot.adapters or any(
        _why_always(model, wrapper) for _, wrapper in wrappers
    ):
        raise MemlongError(
            "The model's adapters were changed inside `with decoder:`, where they are to act on rows with memory alone "
            "(adapter_for='memory'). Leave the block, change them, and enter it again"
        )


@contextmanager
def _noted(slot: AttentionSlot, adapters: frozenset[int]) -> Iterator[None]:
    slot.adapters = adapters
    try:
        yield
    finally:
        slot.adapters = None


def _why_always(model: PreTrainedModel, wrapper: Any) -> str:
    """Say why an adapter's layer cannot be left out, if it acts; nothing if it can."""
    if getattr(wrapper, "merged_adapters", None):
        return "is merged into the weights"
    if wrapper.disable_adapters:
        return ""
    if not hasattr(wrapper, "base_layer"):
        return "is no layer around another" if any(_own_tensors(wrapper).values()) else ""
    for name in wrapper.active_adapters:
        config = getattr(model, "peft_config", {}).get(name)
        if getattr(config, "init_lora_weights", True) not in HARMLESS_STARTS:
            return "has changed the weights of the model itself (init_lora_weights)"
        if getattr(config, "bias", "none") != "none":
            return "has biases in the model itself"
    return ""


@dataclass(frozen=True)
class _WithMemory:
    """The ``forward`` of an adapter's layer that acts only on rows with memory; a copy of the layer has its own."""

    layer: Any
    adapted: Callable[..., Tensor]
    path: str
    slot: AttentionSlot

    def __call__(self, given: Tensor, *args: Any, **options: Any) -> Tensor:
        now = self.slot.current
        rows = now is None or now.with_memory
        if rows is True:
            return self.adapted(given, *args, **options)
        plain = self.layer
        while hasattr(plain, "base_layer"):
            plain = plain.base_layer
        if rows is False:
            return cast("Tensor", plain(given, *args, **options))
        held, others = rows
        more = any(isinstance(each, Tensor) for each in (*args, *options.values()))
        if len(given) != len(held) + len(others) or more:
            raise UnsupportedModelError(
                f"With adapter_for 'memory', rows of which only some have retrieved chunks must be read one by one by "
                f"this model: its layer {self.path!r}, which has an adapter, does not take them row by row"
            )
        with_memory = self.adapted(given[held], *args, **options)
        without = plain(given[others], *args, **options)
        whole = with_memory.new_empty(len(given), *with_memory.shape[1:])
        return whole.index_copy(0, held, with_memory).index_copy(0, others, without)


def _wrappers(model: nn.Module) -> list[tuple[str, Any]]:
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [(path, module) for path, module in model.named_modules() if isinstance(module, kinds)]


def _own_tensors(wrapper: Any) -> dict[str, dict[str, Tensor]]:
    """Return the weights of each active adapter in one of its layers, by their names there."""
    tensors = {**dict(wrapper.named_parameters()), **dict(wrapper.named_buffers())}
    return {
        adapter: {
            name: tensors[name]
            for name in sorted(tensors)
            if adapter in (parts := name.split(".")) and parts[0] not in _INSIDE
        }
        for adapter in wrapper.active_adapters
    }


def _without(name: str, around: set[str]) -> str | None:
    """Return the name of a tensor as it is without the layers around; None if it is an adapter's."""
    path, plain = "", []
    for part in name.split("."):
        if path not in around:
            plain.append(part)
        elif part not in _INSIDE:
            return None
        path = f"{path}.{part}" if path else part
    return ".".join(plain)
