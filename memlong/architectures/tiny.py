"""Build a tiny random model of any architecture in the installed transformers.

The default configuration is shrunk by rules on the names of settings, plus a few exceptions. New model types of
transformers need no change here.
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
    """Return a model type's default configuration, as small as possible while keeping every kind of layer."""
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
    """Build a random float32 model on the CPU, with about four layers, for texts of up to 512 tokens.

    Parameters
    ----------
    architecture
        One of `architectures`, or a model type, which stands for its first class.
    attention
        Attention implementation; transformers chooses by default.
    seed
        Random seed of the weights. Torch's global random state is unchanged.

    Raises
    ------
    UnknownNameError
        If the model type is unknown.
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
    """Build a random float32 model of a class, with attention peaked enough that wrong K-V change the logits."""
    text = config.get_text_config(decoder=True)
    if not isinstance(config, kind.config_class) and isinstance(text, kind.config_class):
        config = text  # a text-only class of a multimodal model type
    options = {} if attention is None else {"attn_implementation": attention}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        model: PreTrainedModel = kind._from_config(config, dtype=torch.float32, **options)  # noqa: SLF001 - as from_config
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.15)  # with the usual initialization, attention is nearly uniform
    model.float().eval()
    return model


def _without_timm(config: PreTrainedConfig) -> None:
    """Replace timm vision towers with a small one from transformers: images are not used, and timm may be missing."""
    for name in type(config).sub_configs:
        tower: Any = getattr(config, name, None)
        if hasattr(tower, "model_args") and hasattr(tower, "architecture"):
            vars(config)[name] = _small_tower(tower)  # bypasses the type check


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
