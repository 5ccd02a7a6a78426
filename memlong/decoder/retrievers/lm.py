"""The tokens of a passage, weighed by the language model itself, as the retriever: no second model, hardly any cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memlong.bank.validate import whole_number
from memlong.decoder.retrievers.base import Passage, Retriever
from memlong.errors import InvalidArgumentError

_HASHES = 8


class LanguageModelRetriever(Retriever):
    """Finds the chunks that share the query's telling tokens, the latest above all.

    Each token adds random directions of its own (a count sketch), so that passages are alike by the tokens they share.
    It weighs what the language model thinks it tells on its own, its surprisal ``-log p`` where a text begins, times
    a count that saturates, as in BM25. In a query, an occurrence counts half at every ``half_life`` tokens back: what
    comes next has most to do with what came last.

    Parameters
    ----------
    dim
        Width of the embeddings. Chance likenesses between passages go down with its square root.
    sharpness
        Exponent of the surprisal; 0 weighs all tokens alike.
    saturation
        ``k`` in a token's weight ``count / (count + k)``: near 0, occurrences after the first tell nothing; the larger,
        the more they add.
    half_life
        Tokens back from a query's end at which an occurrence counts half. Chunks are weighed evenly.

    Notes
    -----
    Count sketch: Charikar, Chen and Farach-Colton, "Finding frequent items in data streams", 2002. Saturation:
    Robertson and Zaragoza, "The probabilistic relevance framework: BM25 and beyond", 2009, section 3.4.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        dim: int = 4096,
        sharpness: float = 1.0,
        saturation: float = 5.0,
        half_life: float = 32.0,
    ) -> None:
        super().__init__(model, tokenizer)
        self._dim = whole_number("dim", dim, at_least=1)
        self._saturation = _within("saturation", saturation, 1e-3, 1e6)
        self._half_life = _within("half_life", half_life, 1.0, 1e9)
        start = getattr(model.config, "bos_token_id", None) or 0
        device = model.get_input_embeddings().weight.device
        with torch.no_grad():
            logits = model(torch.tensor([[start]], device=device)).logits[0, -1]
        surprisal = -logits.float().log_softmax(dim=0).to("cpu")
        self._weights = surprisal ** _within("sharpness", sharpness, 0.0, 8.0)
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
        return torch.stack([self._sketch(chunk, torch.ones(len(chunk.token_ids))) for chunk in chunks])

    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """Embeddings of the queries [queries, dim]."""
        return torch.stack([self._sketch(query, self._fading(len(query.token_ids))) for query in queries])

    def _fading(self, length: int) -> Tensor:
        """What each occurrence counts [length], 1 at the end."""
        return 0.5 ** (torch.arange(length).flip(0) / self._half_life)

    def _sketch(self, passage: Passage, occurrences: Tensor) -> Tensor:
        tokens, which = torch.tensor(passage.token_ids).unique(return_inverse=True)
        counts = torch.zeros(len(tokens)).index_add_(0, which, occurrences)
        weights = self._weights[tokens] * counts / (counts + self._saturation)
        signed = weights[:, None] * self._signs[tokens]
        return torch.zeros(self._dim).index_add_(0, self._places[tokens].flatten(), signed.flatten())


def _within(name: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise InvalidArgumentError(f"{name} is {value!r}; expected a number from {least:g} to {most:g}.")
    return float(value)
