"""The retriever interface: turns chunks and queries into embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from memlong.bank.metric import Metric
from memlong.bank.snapshot.options import SavedOptions
from memlong.errors import InvalidArgumentError

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
    half_life
        In a query, a token so many before the last counts half as much as that, and one twice as far a quarter; None
        if all count alike.

    Raises
    ------
    InvalidArgumentError
        If ``half_life`` is less than 1.
    """

    token_ids: tuple[int, ...]
    start: int
    half_life: int | None = None

    def __post_init__(self) -> None:
        if self.half_life is not None and self.half_life < 1:
            raise InvalidArgumentError(f"half_life must be at least 1, or None, got {self.half_life!r}")

    @property
    def end(self) -> int:
        """Index in the stream one past the last token."""
        return self.start + len(self.token_ids)

    @property
    def latest(self) -> Passage:
        """Its last tokens, as many as its half-life, where all of them count alike; itself if it has none."""
        if self.half_life is None:
            return self
        kept = self.token_ids[-self.half_life :]
        return Passage(kept, self.end - len(kept))


@dataclass(frozen=True, eq=False)
class Candidates:
    """The chunks that a bank found for a query, in ascending order of ids, which for one stream is that of its text.

    A bank keeps no text and no tokens of a chunk.

    Attributes
    ----------
    query
        What asks: the text just before a segment, or the last tokens of an answer, with a half-life.
    query_embedding
        Its embedding [dim], float32, as it was searched for.
    ids
        Of the chunks [n], int64.
    scores
        Their similarities to the query [n], float32; higher is better for each metric.
    embeddings
        [n, dim], float32, as they are searched: of unit length under the cosine metric.
    spans
        Their tokens [start, end) in the text that each is of [n, 2], int64.
    """

    query: Passage
    query_embedding: Tensor
    ids: Tensor
    scores: Tensor
    embeddings: Tensor
    spans: Tensor

    def __len__(self) -> int:
        return len(self.ids)


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

    query_options: ClassVar[Collection[str]] = ()
    """Options that the embeddings of chunks do not depend on: a memory may be continued with other values of these."""

    candidates: int = 0
    """How many chunks `rerank` chooses from, if not fewer than are retrieved; 0 to take those that the bank finds."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @property
    @abstractmethod
    def dim(self) -> int:
        """Width of the embeddings."""

    @abstractmethod
    def embed_chunks(self, chunks: Sequence[Passage]) -> Tensor:
        """Embeddings [chunks, dim], float32.

        A passage ends where its chunk does, and begins ``embedding_overlap`` tokens before it, or as many as there are.
        """

    @abstractmethod
    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """Embeddings [queries, dim], float32."""

    def embed_focus(
        self,
        queries: Sequence[Passage],
        means: Tensor,
        sizes: Sequence[int],  # noqa: ARG002 - for those that override it
    ) -> Tensor:
        """Embeddings [queries, dim] of the last tokens of a text that is being generated.

        By default, those of `Passage.latest`, less what all chunks have in common (see `without_component`). Where 0 is
        left, `embed_queries` is asked for these instead. A retriever that wraps another passes this on to it.

        Parameters
        ----------
        queries
            The last tokens of each text, which count less the farther they are from its end (`Passage.half_life`).
        means
            The mean embedding of each bank [queries, dim].
        sizes
            How many chunks each bank holds [queries].
        """
        made = self.embed_queries([each.latest for each in queries])
        found = made if isinstance(made, Tensor) else torch.as_tensor(made, device="cpu")
        # Distances do not change where all vectors are moved by the mean.
        return found if self.metric == "l2" else without_component(found, means)

    def rerank(self, found: Candidates) -> Tensor:
        """Score the best ``candidates`` chunks of a bank again [n >= 1]; those with the highest scores are retrieved.

        Equal scores keep the order of ``found``; a chunk whose score is -inf is not retrieved. It must depend on its
        argument alone. A retriever that wraps another passes this on to it, and ``candidates`` with it.
        """
        return found.scores


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
