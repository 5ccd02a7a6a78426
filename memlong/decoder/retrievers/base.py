"""The retriever interface: turns chunks and queries into embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from memlong.bank.metric import Metric
from memlong.bank.snapshot.options import SavedOptions


@dataclass(frozen=True)
class Passage:
    """Consecutive tokens of a stream.

    Attributes
    ----------
    token_ids
        Token ids of the language model.
    start
        Index of the first token in the stream.
    """

    token_ids: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        """Index in the stream one past the last token."""
        return self.start + len(self.token_ids)


class Retriever(ABC):
    """Embeds chunks as they leave the window, and queries: the text right before a segment.

    An embedding must depend only on its passage, since rows of a batch and users share a retriever.

    Parameters
    ----------
    model, tokenizer
        The language model with the memory, and its tokenizer. A retriever's own options are keyword arguments.
    """

    metric: ClassVar[Metric] = "cosine"
    """How the bank compares embeddings."""

    saved_options: ClassVar[SavedOptions] = {}
    """Options that a trained decoder's folder, which may be untrusted, may set, each with the largest number allowed
    there, or None. Never include an address, a credential, a path to write to, or code."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @property
    @abstractmethod
    def dim(self) -> int:
        """Width of the embeddings."""

    @abstractmethod
    def embed_chunks(self, chunks: Sequence[Passage]) -> Tensor:
        """Embeddings [chunks, dim], float32."""

    @abstractmethod
    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """Embeddings [queries, dim], float32."""
