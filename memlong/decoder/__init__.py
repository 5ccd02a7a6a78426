"""How a model uses a memory: the decoder, its configuration and the retrievers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlong.decoder.config import MemoryConfig
    from memlong.decoder.decoder import MemoryDecoder
    from memlong.decoder.loading import load_model
    from memlong.decoder.machine import Machine, choose_machine
    from memlong.decoder.retrievers.base import Passage, Retriever
    from memlong.decoder.retrievers.create import create_retriever
    from memlong.decoder.streamer import printable, text_streamer
    from memlong.decoder.streams import Segment

# Loaded when first asked for: listing the retrievers must not import transformers.
_HOMES = {
    "Machine": "memlong.decoder.machine",
    "MemoryConfig": "memlong.decoder.config",
    "MemoryDecoder": "memlong.decoder.decoder",
    "Passage": "memlong.decoder.retrievers.base",
    "Retriever": "memlong.decoder.retrievers.base",
    "Segment": "memlong.decoder.streams",
    "choose_machine": "memlong.decoder.machine",
    "create_retriever": "memlong.decoder.retrievers.create",
    "load_model": "memlong.decoder.loading",
    "printable": "memlong.decoder.streamer",
    "text_streamer": "memlong.decoder.streamer",
}

__all__ = [
    "Machine",
    "MemoryConfig",
    "MemoryDecoder",
    "Passage",
    "Retriever",
    "Segment",
    "choose_machine",
    "create_retriever",
    "load_model",
    "printable",
    "text_streamer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
