"""The language model's own token embeddings as the retriever: no second model, hardly any cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memlong.decoder.retrievers.base import Passage, Retriever


class LanguageModelRetriever(Retriever):
    """Sums a passage's token embeddings, rare tokens weighing most.

    A token weighs ``1 / (smoothing + n)``, n being how often the stream has used it so far (in passages that this
    retriever has seen as chunks); a passage counts each distinct token once. Embeddings are centred on the mean of the
    vocabulary first, which otherwise dominates every sum.

    Parameters
    ----------
    smoothing
        How often a token must have occurred before its weight starts to fall off.
    """

    def __init__(self, model: Any, tokenizer: Any, *, smoothing: float = 2.0) -> None:
        super().__init__(model, tokenizer)
        table = model.get_input_embeddings().weight.detach().to("cpu", torch.float32)
        self._table = torch.nn.functional.normalize(table - table.mean(dim=0), dim=1)
        self._smoothing = smoothing
        self.reset()

    @property
    def dim(self) -> int:
        """Width of the model's token embeddings."""
        return int(self._table.shape[1])

    def reset(self) -> None:
        """Forget how often tokens occurred."""
        self._counts = torch.zeros(self._table.shape[0])

    def embed_chunks(self, chunks: Sequence[Passage]) -> Tensor:
        """Embeddings of the chunks [chunks, dim]."""
        for chunk in chunks:
            self._counts[torch.tensor(chunk.token_ids).unique()] += 1
        return self._embed(chunks)

    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """Embeddings of the queries [queries, dim]."""
        return self._embed(queries)

    def _embed(self, passages: Sequence[Passage]) -> Tensor:
        return torch.stack([self._pool(passage) for passage in passages])

    def _pool(self, passage: Passage) -> Tensor:
        tokens = torch.tensor(passage.token_ids).unique()
        weights = 1.0 / (self._smoothing + self._counts[tokens])
        return weights @ self._table[tokens]
