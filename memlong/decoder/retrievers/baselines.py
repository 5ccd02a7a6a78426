"""Baselines that every retriever must beat: random chunks and the most recent chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from memlong.bank.metric import Metric
from memlong.bank.snapshot.options import SavedOptions
from memlong.bank.validate import whole_number
from memlong.decoder.retrievers.base import Passage, Retriever
from memlong.errors import InvalidArgumentError

_WIDEST = 2**16


class RandomRetriever(Retriever):
    """Embeds passages as random directions, so that every chunk is equally likely to be retrieved.

    Parameters
    ----------
    seed
        Random seed; the same seed and position in the stream give the same direction.
    dim
        Width of the embeddings, at most 65,536.
    """

    saved_options: ClassVar[SavedOptions] = {"seed": None, "dim": _WIDEST}

    def __init__(self, model: Any, tokenizer: Any, *, seed: int = 0, dim: int = 64) -> None:
        super().__init__(model, tokenizer)
        self._seed = whole_number("seed", seed, at_least=0)
        self._dim = whole_number("dim", dim, at_least=1)
        if self._dim > _WIDEST:
            raise InvalidArgumentError(f"dim must be at most {_WIDEST}, got {dim}")

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._dim

    def embed_chunks(self, chunks: Sequence[Passage]) -> Tensor:
        """Random embeddings [chunks, dim]."""
        return torch.stack([self._direction(2 * chunk.start) for chunk in chunks])

    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """Random embeddings [queries, dim], independent of those of all chunks."""
        return torch.stack([self._direction(2 * query.end + 1) for query in queries])

    def _direction(self, place: int) -> Tensor:
        seed = np.random.SeedSequence((self._seed, place)).generate_state(1, np.uint64)
        generator = torch.Generator("cpu").manual_seed(int(seed[0] >> np.uint64(1)))
        return torch.randn(self._dim, generator=generator, dtype=torch.float32, device="cpu")


class RecentRetriever(Retriever):
    """Scores a chunk by its position in the stream, so that the most recent chunks outside the window win."""

    metric: ClassVar[Metric] = "inner_product"

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return 1

    def embed_chunks(self, chunks: Sequence[Passage]) -> Tensor:
        """Chunk positions [chunks, 1]; exact in float32 for the first 16 million tokens."""
        starts = [[float(chunk.start)] for chunk in chunks]
        return torch.tensor(starts, dtype=torch.float32, device="cpu")

    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """Ones [queries, 1], so that scores are positions."""
        return torch.ones(len(queries), 1, dtype=torch.float32, device="cpu")
