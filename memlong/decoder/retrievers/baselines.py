"""Baselines that every retriever must beat: random chunks, and the most recent ones."""

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
    """Random directions, so that every chunk is as likely to be retrieved as any other.

    Parameters
    ----------
    seed
        Seed of the directions; the same seed and place in the stream give the same direction.
    dim
        Width of the embeddings, at most 65,536.
    """

    saved_options: ClassVar[SavedOptions] = {"seed": None, "dim": _WIDEST}

    def __init__(self, model: Any, tokenizer: Any, *, seed: int = 0, dim: int = 64) -> None:
        super().__init__(model, tokenizer)
        self._seed = whole_number("seed", seed, at_least=0)
        self._dim = whole_number("dim", dim, at_least=1)
        if self._dim > _WIDEST:
            raise InvalidArgumentError(f"dim is {dim}; expected at most {_WIDEST}.")

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._dim

    def embed_chunks(self, chunks: Sequence[Passage]) -> Tensor:
        """Random embeddings [chunks, dim]."""
        return torch.stack([self._direction(2 * chunk.start) for chunk in chunks])

    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """Random embeddings [queries, dim], unlike those of any chunk."""
        return torch.stack([self._direction(2 * query.end + 1) for query in queries])

    def _direction(self, place: int) -> Tensor:
        seed = np.random.SeedSequence((self._seed, place)).generate_state(1, np.uint64)
        generator = torch.Generator("cpu").manual_seed(int(seed[0] >> np.uint64(1)))
        return torch.randn(self._dim, generator=generator, dtype=torch.float32, device="cpu")


class RecentRetriever(Retriever):
    """Scores a chunk by its place in the stream, so that the latest chunks outside the window win."""

    metric: ClassVar[Metric] = "inner_product"

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return 1

    def embed_chunks(self, chunks: Sequence[Passage]) -> Tensor:
        """The position of each chunk [chunks, 1]; exact in float32 for the first 16 million tokens."""
        starts = [[float(chunk.start)] for chunk in chunks]
        return torch.tensor(starts, dtype=torch.float32, device="cpu")

    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """One [queries, 1], so that the score is the position."""
        return torch.ones(len(queries), 1, dtype=torch.float32, device="cpu")
