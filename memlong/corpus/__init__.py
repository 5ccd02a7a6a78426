"""A corpus: documents that a model has read once, in a memory that many sessions share."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlong.corpus.corpus import Corpus
    from memlong.corpus.document import About, Document, Remembered
    from memlong.corpus.reading import Outcome, remember

# Loaded when first asked for: listing the documents must not import transformers.
_HOMES = {
    "About": "memlong.corpus.document",
    "Corpus": "memlong.corpus.corpus",
    "Document": "memlong.corpus.document",
    "Outcome": "memlong.corpus.reading",
    "Remembered": "memlong.corpus.document",
    "remember": "memlong.corpus.reading",
}

__all__ = ["About", "Corpus", "Document", "Outcome", "Remembered", "remember"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
