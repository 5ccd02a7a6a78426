"""The words of a passage, weighed by the language model itself, as the retriever: no second model, hardly any cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memlong.bank.validate import whole_number
from memlong.decoder.retrievers.base import Passage, Retriever
from memlong.errors import InvalidArgumentError

_HASHES = 8
_SHARPEST = 8


class LanguageModelRetriever(Retriever):
    """Finds the chunks that share the query's telling tokens.

    Each distinct token of a passage adds its own random directions (a count sketch), so that passages are alike by the
    tokens they share. A token weighs what the language model thinks it tells on its own: its surprisal ``-log p`` where
    a text begins, to the power of ``sharpness``. The model's token embeddings in place of the random directions agree
    less with a sentence encoder on which chunks to retrieve.

    Parameters
    ----------
    dim
        Width of the embeddings.
    sharpness
        Exponent of the surprisal; 0 weighs all tokens alike.

    Notes
    -----
    Count sketch: Charikar, Chen and Farach-Colton, "Finding frequent items in data streams", 2002.
    """

    def __init__(self, model: Any, tokenizer: Any, *, dim: int = 1024, sharpness: float = 1.0) -> None:
        super().__init__(model, tokenizer)
        self._dim = whole_number("dim", dim, at_least=1)
        if not isinstance(sharpness, int | float) or not 0 <= sharpness <= _SHARPEST:
            raise InvalidArgumentError(
                f"sharpness is {sharpness!r}; expected a number from 0 to {_SHARPEST}."
            )
        start = getattr(model.config, "bos_token_id", None) or 0
        device = model.get_input_embeddings().weight.device
        with torch.no_grad():
            logits = model(torch.tensor([[start]], device=device)).logits[0, -1]
        self._weights = (-logits.float().log_softmax(dim=0)).to("cpu") ** sharpness
        generator = torch.Generator().manual_seed(0)
        shape = (len(self._weights), _HASHES)
        self._places = torch.randint(dim, shape, generator=generator)
        self._signs = torch.randint(2, shape, generator=generator) * 2.0 - 1.0

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._dim

    def embed_chunks(self, chunks: Sequence[Passage]) -> Tensor:
        """Embeddings of the chunks [chunks, dim]."""
        return torch.stack([self._sketch(chunk) for chunk in chunks])

    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """Embeddings of the queries [queries, dim]."""
        return self.embed_chunks(queries)

    def _sketch(self, passage: Passage) -> Tensor:
        tokens = torch.tensor(sorted(set(passage.token_ids)))
        weighted = self._weights[tokens, None] * self._signs[tokens]
        return torch.zeros(self._dim).index_add_(0, self._places[tokens].flatten(), weighted.flatten())
