"""Build models of any size in seconds and with little memory, to find the shapes of their keys and values.

Whatever keys and values do not depend on is shrunk, all weights of one shape share one tensor, and the model's initial
weights are never touched, so that they take no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from memlong.architectures.shrinking import leaned
from memlong.decoder.model.layout import ModelLayout

Attempt = tuple[Callable[[], PreTrainedModel], Callable[[ModelLayout], bool]]

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # within the small vocabulary
_SCALE = 0.3  # of weights: otherwise rounding errors grow from layer to layer
_HEADS_OF_STATES = (("mamba_n_heads", "mamba_d_head"), ("n_mamba_heads", "mamba_headdim"))


def light_models(kind: Any, config: PreTrainedConfig) -> Iterator[Attempt]:
    """Yield ways to build a light model, the lightest first, each with a check that its K-V have the right shapes.

    The first has fewer query heads and a smaller hidden size, which does not affect keys and values unless a class
    derives their width from it; the last keeps those of the configuration.
    """
    yield partial(_made, kind, config, _narrow), partial(_heads_are_whole, config)
    yield partial(_made, kind, config, _lean), bool


def _made(
    kind: Any, config: PreTrainedConfig, slimmed: Callable[[PreTrainedConfig], PreTrainedConfig]
) -> PreTrainedModel:
    config = slimmed(config)
    text = config.get_text_config(decoder=True)
    if not isinstance(config, kind.config_class) and isinstance(text, kind.config_class):
        config = text
    with torch.device("cpu"), no_init_weights():
        model: PreTrainedModel = kind._from_config(config, dtype=torch.float32)  # noqa: SLF001 - as from_config
    weights: dict[torch.Size, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.shape not in weights:
            weights[parameter.shape] = _weights(parameter.shape, generator)
        parameter.data = weights[parameter.shape]
    model.eval()
    return model


def _weights(shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) < 2:  # norm scales and state decay rates: also small
        return torch.rand(shape, generator=generator) * 0.2
    return torch.randn(shape, generator=generator).mul_(_SCALE * shape[-1] ** -0.5)


def _lean(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration with a small vocabulary, small MLPs and few experts."""
    lean = deepcopy(config)
    vars(lean).pop("quantization_config", None)
    text = lean.get_text_config(decoder=True)
    for name, value in leaned(text.to_dict()).items():
        setattr(text, name, value)
    for section in (lean, text):
        for name, token in _SPECIAL.items():
            if getattr(section, name, None) is not None:
                setattr(section, name, token)
    return lean


def _narrow(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the lean configuration with as many query heads as key heads, and a hidden size to match."""
    narrow = _lean(config)
    text: Any = narrow.get_text_config(decoder=True)
    head_dim = _head_dim(text)
    if getattr(text, "kv_lora_rank", None):  # latent attention: its cache has no heads
        text.num_attention_heads = text.num_key_value_heads = 4
    else:
        text.num_attention_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        text.head_dim = head_dim
    text.hidden_size = text.num_attention_heads * head_dim
    for heads, width in _HEADS_OF_STATES:
        if hasattr(text, heads):
            setattr(text, width, _expansion(text) * text.hidden_size // getattr(text, heads))
    if hasattr(text, "mamba_d_ssm"):
        text.mamba_d_ssm = _expansion(text) * text.hidden_size
    return narrow


def _expansion(text: Any) -> int:
    return int(getattr(text, "mamba_expand", getattr(text, "expand", 2)))


def _head_dim(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _heads_are_whole(config: PreTrainedConfig, layout: ModelLayout) -> bool:
    """Return whether heads have the configured width, although the hidden size differs."""
    layers = layout.layers.values()
    return any(
        layer.keys_second or layer.head_dim == _head_dim(config.get_text_config(decoder=True))
        for layer in layers
    )
