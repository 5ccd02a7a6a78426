"""The retriever interface: turns chunks and queries into embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from memlong.bank.metric import Metric
from memlong.bank.snapshot.options import SavedOptions

_ROUNDING = 1e-5


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

    def embed_focus(self, queries: Sequence[Passage], means: Tensor) -> Tensor:
        """Embeddings [queries, dim] of the last few tokens of a text that is being generated.

        What all chunks have in common does not count (see `without_component`). Where 0 is left, `embed_queries` is
        asked instead. A retriever that wraps another passes this on to it.

        Parameters
        ----------
        queries
            The last few tokens of each text.
        means
            The mean embedding of each bank [queries, dim].
        """
        made = self.embed_queries(queries)
        found = made if isinstance(made, Tensor) else torch.as_tensor(made, device="cpu")
        # Distances do not change where all vectors are moved by the mean.
        return found if self.metric == "l2" else without_component(found, means)


def without_component(vectors: Tensor, directions: Tensor) -> Tensor:
    """Remove from each vector [n, dim] its component along a direction [n, dim]; along 0, nothing is removed.

    A vector of which nothing but rounding would be left becomes 0.
    """
    vectors = vectors.float()
    axes = normalize(directions.to(vectors), dim=1)
    rest = vectors - (vectors * axes).sum(dim=1, keepdim=True) * axes
    is_left = rest.norm(dim=1) > _ROUNDING * vectors.norm(dim=1)
    left: Tensor = rest * is_left[:, None]
    return left
