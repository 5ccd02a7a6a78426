"""Every decoder-only architecture of the installed transformers as a tiny model, and whether memory attaches to it."""

from memlong.architectures.listing import Architecture, architectures, encoder_decoders, of_model_type
from memlong.architectures.tiny import tiny_config, tiny_model_of
from memlong.architectures.trial import Trial, try_architecture

__all__ = [
    "Architecture",
    "Trial",
    "architectures",
    "encoder_decoders",
    "of_model_type",
    "tiny_config",
    "tiny_model_of",
    "try_architecture",
]
