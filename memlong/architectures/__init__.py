"""Every decoder-only architecture of the installed transformers as a tiny model, and whether memory attaches to it."""

from memlong.architectures.tiny import (
    Architecture,
    architectures,
    default_config,
    encoder_decoders,
    tiny_config,
    tiny_model_of,
)
from memlong.architectures.trial import Trial, try_architecture

__all__ = [
    "Architecture",
    "Trial",
    "architectures",
    "default_config",
    "encoder_decoders",
    "tiny_config",
    "tiny_model_of",
    "try_architecture",
]
