"""A tiny random model of any architecture of the installed transformers.

Its configuration is what transformers makes by default, shrunk by the names of the settings; what the rules do not get
right stands among the exceptions. A model type that transformers adds needs nothing here.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from memlong.architectures.exceptions import EXCEPTIONS
from memlong.architectures.listing import Architecture, default_config, of_model_type
from memlong.architectures.shrinking import shrunk


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return the default configuration of a model type, as small as can be with every kind of its layers."""
    default = default_config(model_type)
    settings = shrunk(default.to_dict())
    for path, value in EXCEPTIONS.get(model_type, {}).items():
        *sections, name = path.split(".")
        section = settings
        for each in sections:
            section = section[each]
        section[name] = deepcopy(value)
    config = type(default)(**settings)
    _without_timm(config)
    return config


def tiny_model_of(
    architecture: Architecture | str, attention: str | None = None, seed: int = 0
) -> PreTrainedModel:
    """Make a random float32 model of an architecture for the CPU, of some four layers, for texts of 512 tokens.

    Parameters
    ----------
    architecture
        One of `architectures`, or a model type, of which the first class is meant.
    attention
        The attention implementation; by default transformers chooses.
    seed
        Of the weights. Torch's global generator is left as it was.

    Raises
    ------
    UnknownNameError
        If there is no such model type.
    """
    if isinstance(architecture, str):
        architecture = of_model_type(architecture)[0]
    return random_model(
        getattr(transformers, architecture.class_name),
        tiny_config(architecture.model_type),
        attention=attention,
        seed=seed,
    )


def random_model(
    kind: Any, config: PreTrainedConfig, *, attention: str | None = None, seed: int = 0
) -> PreTrainedModel:
    """Make a random float32 model of a class, whose attention is sharp enough that what it attends to matters."""
    text = config.get_text_config(decoder=True)
    if not isinstance(config, kind.config_class) and isinstance(text, kind.config_class):
        config = text  # the class for text alone of a type that also sees images
    options = {} if attention is None else {"attn_implementation": attention}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        model: PreTrainedModel = kind._from_config(config, dtype=torch.float32, **options)  # noqa: SLF001 - as from_config
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.15)  # attention of a usual start is nearly flat
    model.float().eval()
    return model


def _without_timm(config: PreTrainedConfig) -> None:
    """Put a small tower of transformers' own where one of timm is: images play no part, and timm may not be there."""
    for name in type(config).sub_configs:
        tower: Any = getattr(config, name, None)
        if hasattr(tower, "model_args") and hasattr(tower, "architecture"):
            vars(config)[name] = _small_tower(tower)  # past the check of its type


def _small_tower(tower: PreTrainedConfig) -> PreTrainedConfig:
    small = transformers.SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    small.update({name: value for name, value in tower.to_dict().items() if name.startswith("vocab_")})
    small.update({"model_args": {"embed_dim": 64}, "rms_norm_eps": 1e-6})
    return small
