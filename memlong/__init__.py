"""memlong: long-term memory for Hugging Face decoder-only models, on the vector index of your choice."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlong.bank import (
        BankPool,
        EvictionPolicy,
        KeyValueStore,
        LayeredBank,
        MemoryBank,
        Retrieved,
        SearchResult,
    )
    from memlong.decoder import (
        Candidates,
        MemoryConfig,
        MemoryDecoder,
        Passage,
        Retriever,
        Segment,
        SessionPool,
        load_model,
    )
    from memlong.errors import MemlongError, SnapshotError
    from memlong.plugins import PluginManager, Registry, create_bank, hookimpl, list_backends, load_bank

__version__ = "0.1.0"

# Loaded when first asked for, so that `import memlong` brings neither torch nor transformers nor any backend.
_HOMES = {
    "memlong.bank": (
        "BankPool",
        "EvictionPolicy",
        "KeyValueStore",
        "LayeredBank",
        "MemoryBank",
        "Retrieved",
        "SearchResult",
    ),
    "memlong.decoder": (
        "Candidates",
        "MemoryConfig",
        "MemoryDecoder",
        "Passage",
        "Retriever",
        "Segment",
        "SessionPool",
        "load_model",
    ),
    "memlong.errors": ("MemlongError", "SnapshotError"),
    "memlong.plugins": (
        "PluginManager",
        "Registry",
        "create_bank",
        "hookimpl",
        "list_backends",
        "load_bank",
    ),
}

__all__ = [
    "BankPool",
    "Candidates",
    "EvictionPolicy",
    "KeyValueStore",
    "LayeredBank",
    "MemlongError",
    "MemoryBank",
    "MemoryConfig",
    "MemoryDecoder",
    "Passage",
    "PluginManager",
    "Registry",
    "Retrieved",
    "Retriever",
    "SearchResult",
    "Segment",
    "SessionPool",
    "SnapshotError",
    "__version__",
    "create_bank",
    "hookimpl",
    "list_backends",
    "load_bank",
    "load_model",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
