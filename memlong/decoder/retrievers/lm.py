"""The language model's own token embeddings as the retriever: no second model, hardly any cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memlong.decoder.retrievers.base import Passage, Retriever


class LanguageModelRetriever(Retriever):
    """Sums a passage's token embeddings, surprising tokens weighing most.

    A token weighs what the model thinks it tells on its own, its surprisal ``-log p`` where a text begins, to the power
    of ``sharpness``; each distinct token of a passage counts once. Embeddings are centred on the mean of the
    vocabulary, which otherwise dominates every sum.

    Parameters
    ----------
    sharpness
        Exponent of the surprisal; 0 weighs all tokens alike.
    """

    def __init__(self, model: Any, tokenizer: Any, *, sharpness: float = 2.0) -> None:
        super().__init__(model, tokenizer)
        embeddings = model.get_input_embeddings().weight.detach()
        table = embeddings.to("cpu", torch.float32)
        self._table = torch.nn.functional.normalize(table - table.mean(dim=0), dim=1)
        start = getattr(model.config, "bos_token_id", None) or 0
        with torch.no_grad():
            logits = model(torch.tensor([[start]], device=embeddings.device)).logits[0, -1]
        surprisal = -logits.float().log_softmax(dim=0).to("cpu")[: len(table)]
        self._weights = surprisal**sharpness

    @property
    def dim(self) -> int:
        """Width of the model's token embeddings."""
        return int(self._table.shape[1])

    def embed_chunks(self, chunks: Sequence[Passage]) -> Tensor:
        """Embeddings of the chunks [chunks, dim]."""
        return torch.stack([self._pool(chunk) for chunk in chunks])

    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """Embeddings of the queries [queries, dim]."""
        return self.embed_chunks(queries)

    def _pool(self, passage: Passage) -> Tensor:
        tokens = torch.tensor(sorted(set(passage.token_ids)))
        return torch.mv(self._table[tokens].T, self._weights[tokens])
