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
from memlong.errors import UnsupportedModelError

_INSIDE = ("base_layer", "original_module", "token_adapter")  # how peft's layers name what they are around
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
        tensors = {**dict(wrapper.named_parameters()), **dict(wrapper.named_buffers())}
        for adapter in wrapper.active_adapters:
            theirs = {
                name: tensors[name]
                for name in sorted(tensors)
                if adapter in (parts := name.split(".")) and parts[0] not in _INSIDE
            }
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
        If an adapter is part of the model's weights, or is no layer around another.
    """
    with ExitStack() as changes:
        for path, wrapper in _wrappers(model):
            if wrapper.disable_adapters:
                continue
            if not hasattr(wrapper, "base_layer") or wrapper.merged_adapters:
                raise UnsupportedModelError(
                    f"adapter_for must be 'all' for this {type(model).__name__}, as its adapter at {path!r} cannot be "
                    "left out of a forward call: it is merged into the weights, or no layer around another"
                )
            changes.enter_context(replaced(wrapper, "forward", _WithMemory(wrapper, wrapper.forward, slot)))
        yield


@dataclass(frozen=True)
class _WithMemory:
    """The ``forward`` of an adapter's layer that acts only on rows with memory; a copy of the layer has its own."""

    layer: Any
    adapted: Callable[..., Tensor]
    slot: AttentionSlot

    def __call__(self, given: Tensor, *args: Any, **options: Any) -> Tensor:
        now = self.slot.current
        rows = now is None or now.with_memory
        if rows is True:
            return self.adapted(given, *args, **options)
        plain: Callable[..., Tensor] = self.layer.base_layer
        if rows is False:
            return plain(given, *args, **options)
        held, others = rows
        if len(given) != len(held) + len(others):
            raise UnsupportedModelError(
                f"adapter_for must be 'all' with several rows, as this {type(plain).__name__} is not given a row each, "
                "and so its adapter cannot act on some of them"
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
