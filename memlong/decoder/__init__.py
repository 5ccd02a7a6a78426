"""How a model uses a memory: the decoder, its configuration and the retrievers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlong.decoder.config import MemoryConfig
    from memlong.decoder.decoder import MemoryDecoder
    from memlong.decoder.generation import StreamCache
    from memlong.decoder.kv.sources import KvSource
    from memlong.decoder.model.layout import ModelLayout
    from memlong.decoder.model.loading import load_model
    from memlong.decoder.model.machine import Machine, choose_machine
    from memlong.decoder.retrievers.base import Candidates, Passage, Retriever
    from memlong.decoder.retrievers.create import create_retriever
    from memlong.decoder.scoring import Likelihood
    from memlong.decoder.sessions import SessionPool
    from memlong.decoder.sources import Source, Sources
    from memlong.decoder.stream.retrieval import Choice, Reranking, Retrieval, Search
    from memlong.decoder.stream.segment import Segment, Segments
    from memlong.decoder.stream.streamer import printable, text_streamer

# Loaded when first asked for: listing the retrievers must not import transformers.
_HOMES = {
    "Candidates": "memlong.decoder.retrievers.base",
    "Choice": "memlong.decoder.stream.retrieval",
    "KvSource": "memlong.decoder.kv.sources",
    "Likelihood": "memlong.decoder.scoring",
    "Machine": "memlong.decoder.model.machine",
    "MemoryConfig": "memlong.decoder.config",
    "MemoryDecoder": "memlong.decoder.decoder",
    "ModelLayout": "memlong.decoder.model.layout",
    "Passage": "memlong.decoder.retrievers.base",
    "Reranking": "memlong.decoder.stream.retrieval",
    "Retrieval": "memlong.decoder.stream.retrieval",
    "Retriever": "memlong.decoder.retrievers.base",
    "Search": "memlong.decoder.stream.retrieval",
    "Segment": "memlong.decoder.stream.segment",
    "Segments": "memlong.decoder.stream.segment",
    "SessionPool": "memlong.decoder.sessions",
    "Source": "memlong.decoder.sources",
    "Sources": "memlong.decoder.sources",
    "StreamCache": "memlong.decoder.generation",
    "choose_machine": "memlong.decoder.model.machine",
    "create_retriever": "memlong.decoder.retrievers.create",
    "load_model": "memlong.decoder.model.loading",
    "printable": "memlong.decoder.stream.streamer",
    "text_streamer": "memlong.decoder.stream.streamer",
}

__all__ = [
    "Candidates",
    "Choice",
    "KvSource",
    "Likelihood",
    "Machine",
    "MemoryConfig",
    "MemoryDecoder",
    "ModelLayout",
    "Passage",
    "Reranking",
    "Retrieval",
    "Retriever",
    "Search",
    "Segment",
    "Segments",
    "SessionPool",
    "Source",
    "Sources",
    "StreamCache",
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
