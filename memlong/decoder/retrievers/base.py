"""The interface of a retriever: what turns chunks and queries into embeddings."""

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
        The tokens, as the language model knows them.
    start
        Index in the stream of the first of them.
    """

    token_ids: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        """Index in the stream of the token after the last."""
        return self.start + len(self.token_ids)


class Retriever(ABC):
    """Embeds chunks, when they leave the window, and queries, the text just before a segment.

    An embedding depends on its passage alone: rows of a batch and users share a retriever and must not notice.

    Parameters
    ----------
    model, tokenizer
        The language model that has the memory, and its tokenizer. Options of a retriever's own follow as keywords.
    """

    metric: ClassVar[Metric] = "cosine"
    """How the bank is to compare the embeddings."""

    saved_options: ClassVar[SavedOptions] = {}
    """Options of its own that a trained decoder's folder, which may be a stranger's, may choose, each with the most
    that a number may be there, or None. Never one that names an address, a credential, a place to write to, or code."""

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
