"""Tiny models of every decoder-only architecture in the installed transformers, and whether memory attaches to them."""

from memlong.architectures.listing import (
    TRANSFORMERS,
    Architecture,
    architectures,
    encoder_decoders,
    is_model_type,
    of_model_type,
)
from memlong.architectures.outline import Outline, outline
from memlong.architectures.reading import read_config
from memlong.architectures.tiny import tiny_config, tiny_model_of
from memlong.architectures.trial import Trial, try_architecture

__all__ = [
    "TRANSFORMERS",
    "Architecture",
    "Outline",
    "Trial",
    "architectures",
    "encoder_decoders",
    "is_model_type",
    "of_model_type",
    "outline",
    "read_config",
    "tiny_config",
    "tiny_model_of",
    "try_architecture",
]
