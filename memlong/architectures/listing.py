"""List the decoder-only architectures of the installed transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers import PreTrainedConfig, __version__
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from memlong.architectures.exceptions import NEEDED
from memlong.decoder.model.quiet_loading import quiet_loading
from memlong.errors import UnknownNameError

TRANSFORMERS = __version__
"""Version of the installed transformers."""

_MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")


@dataclass(frozen=True, order=True)
class Architecture:
    """A model class of transformers, and the model type of its configuration."""

    model_type: str
    class_name: str


def architectures() -> tuple[Architecture, ...]:
    """Return every class that reads text with a decoder only, multimodal ones included; sorted."""
    return tuple(each for each in _mapped() if not _has_encoder(each.model_type))


def encoder_decoders() -> tuple[str, ...]:
    """Return the model types that are excluded because an encoder reads their text; sorted."""
    return tuple(sorted({each.model_type for each in _mapped() if _has_encoder(each.model_type)}))


def is_model_type(name: str) -> bool:
    """Return whether transformers has a decoder-only architecture of this model type."""
    return any(each.model_type == name for each in _mapped()) and not _has_encoder(name)


def of_model_type(model_type: str) -> tuple[Architecture, ...]:
    """Return the classes of a model type.

    Raises
    ------
    UnknownNameError
        If transformers has no decoder-only class of this model type.
    """
    if not is_model_type(model_type):
        raise UnknownNameError(
            f"transformers has no decoder-only architecture of model type {model_type!r}: run `memlong models` for a "
            "list. For your own model, give its folder, config.json or hub id"
        )
    return tuple(each for each in _mapped() if each.model_type == model_type)


@cache
def default_config(model_type: str) -> PreTrainedConfig:
    """Return the default configuration of a model type."""
    kind: Any = CONFIG_MAPPING[model_type]
    with quiet_loading():
        config: PreTrainedConfig = kind(**NEEDED.get(model_type, {}))
    return config


@cache
def _mapped() -> tuple[Architecture, ...]:
    return tuple(sorted(set(_entries())))


def _entries() -> Iterator[Architecture]:
    for name in _MAPPINGS:
        for model_type, classes in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}).items():
            for class_name in (classes,) if isinstance(classes, str) else classes:
                yield Architecture(model_type, class_name)


def _has_encoder(model_type: str) -> bool:
    try:
        config: Any = default_config(model_type)
    except Exception:  # noqa: BLE001 - a class with required settings may raise anything
        config = CONFIG_MAPPING[model_type]
    return bool(getattr(config, "is_encoder_decoder", False))
