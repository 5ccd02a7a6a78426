"""Retrieval methods that memlong does not ship: scoring functions, each made a retriever by `Scored`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from memlong import MemoryConfig, MemoryDecoder, Passage, Retriever
from memlong.errors import MissingDependencyError

PAST = 64  # number of latest queries that attend to the chunks
Score = Callable[[Sequence[Passage], Passage], Tensor]
"""Takes the chunks in the bank and a query, and returns the chunks' scores [chunks]."""


class Scored(Retriever):
    """A retriever for any scoring function: chunks are one-hot vectors, and a query is the vector of all scores."""

    metric = "inner_product"

    def __init__(self, score: Score, most: int) -> None:
        super().__init__(None, None)
        self._score = score
        self._most = most
        self._chunks: list[Passage] = []

    @property
    def dim(self) -> int:
        """The maximum number of chunks."""
        return self._most

    def embed_chunks(self, chunks: Sequence[Passage]) -> Tensor:
        """One-hot vectors."""
        first = len(self._chunks)
        self._chunks += chunks
        return torch.eye(self._most)[first : len(self._chunks)]

    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """The scores of all chunks."""
        found = torch.zeros(len(queries), self._most)
        for row, query in enumerate(queries):
            scores = self._score(self._chunks, query).float()
            found[row, : len(scores)] = scores
        return found


class States:
    """The inputs of a model's attention layers for a text, streamed with the plain window."""

    def __init__(self, model: Any, tokenizer: Any, input_ids: Tensor) -> None:
        self._inputs: dict[int, list[Tensor]] = {}
        with MemoryDecoder(model, tokenizer, MemoryConfig(backend=None)) as decoder:
            self._modules = decoder.model_layout.modules
            hooks = [
                module.register_forward_pre_hook(self._note(layer), with_kwargs=True)
                for layer, module in enumerate(self._modules)
            ]
            decoder.read(input_ids)
            for hook in hooks:
                hook.remove()

    def hidden(self, layer: int) -> Tensor:
        """Input of a layer's attention [tokens, hidden], float32."""
        return torch.cat(self._inputs[layer]).float()

    def keys_and_queries(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and queries before RoPE [tokens, kv_heads, head_dim]; queries of heads that share keys are averaged."""
        module: Any = self._modules[layer]
        hidden = torch.cat(self._inputs[layer])
        with torch.no_grad():
            keys = module.k_proj(hidden).float().unflatten(-1, (-1, module.head_dim))
            queries = module.q_proj(hidden).float().unflatten(-1, (keys.shape[1], -1, module.head_dim))
        return keys, queries.mean(dim=2)

    def _note(self, layer: int) -> Any:
        def note(_module: Any, arguments: Any, named: Any) -> None:
            given = arguments[0] if arguments else named["hidden_states"]
            self._inputs.setdefault(layer, []).append(given[0].detach())

        return note


def bm25(chunks: Sequence[Passage], query: Passage) -> Tensor:
    """BM25 over the tokens of the chunks in the bank."""
    try:
        library = importlib.import_module("bm25s")
    except ImportError as error:
        raise MissingDependencyError("The row BM25 needs the package bm25s: pip install bm25s") from error
    index = library.BM25()
    vocabulary = {
        token: place for place, token in enumerate(sorted({t for c in chunks for t in c.token_ids}))
    }
    corpus = [[vocabulary[token] for token in chunk.token_ids] for chunk in chunks]
    index.index((corpus, vocabulary), show_progress=False)
    return torch.from_numpy(
        index.get_scores_from_ids([vocabulary[t] for t in query.token_ids if t in vocabulary])
    )


def pooled(states: Tensor) -> Score:
    """Cosine of mean states [tokens, width], minus the mean of everything before the segment."""
    sums = torch.cat([states.new_zeros(1, states.shape[1]), states]).double().cumsum(dim=0)

    def mean(passage: Passage) -> Tensor:
        return (sums[passage.end] - sums[passage.start]) / (passage.end - passage.start)

    def score(chunks: Sequence[Passage], query: Passage) -> Tensor:
        common = sums[query.end] / query.end
        means = torch.stack([mean(chunk) for chunk in chunks]) - common
        return normalize(means, dim=1) @ normalize(mean(query) - common, dim=0)

    return score


def token_vectors(vectors: Tensor, input_ids: Tensor) -> Score:
    """Cosine of summed token embeddings, each divided by the square root of the token's count so far."""

    def score(chunks: Sequence[Passage], query: Passage) -> Tensor:
        counts = torch.bincount(input_ids[: query.end], minlength=len(vectors)).clamp_min(1)

        def total(passages: Sequence[Passage]) -> Tensor:
            tokens = torch.tensor([passage.token_ids for passage in passages])
            return normalize((vectors[tokens] / counts[tokens].sqrt()[..., None]).sum(dim=1), dim=1)

        return total(chunks) @ total([query])[0]

    return score


def attention(keys: Tensor, queries: Tensor) -> Score:
    """How much the latest queries would attend to each chunk, averaged over heads and queries."""

    def score(chunks: Sequence[Passage], query: Passage) -> Tensor:
        blocks = torch.stack([keys[chunk.start : chunk.end] for chunk in chunks])
        blocks = blocks - keys[: query.end].mean(dim=0)
        logits = torch.einsum("qhd,cnhd->hqcn", queries[query.end - PAST : query.end], blocks)
        mass = (logits / keys.shape[-1] ** 0.5).logsumexp(dim=-1)
        return (mass - mass.mean(dim=-1, keepdim=True)).mean(dim=(0, 1))

    return score


def embedding(retriever: Retriever) -> Score:
    """Cosine of a retriever's embeddings, each computed once."""
    made: list[Tensor] = []

    def score(chunks: Sequence[Passage], query: Passage) -> Tensor:
        if len(chunks) > len(made):
            made.extend(normalize(retriever.embed_chunks(chunks[len(made) :]).float(), dim=1))
        return torch.stack(made) @ normalize(retriever.embed_queries([query])[0].float(), dim=0)

    return score


def mixed(*scores: Score) -> Score:
    """The sum of standardized scores."""

    def score(chunks: Sequence[Passage], query: Passage) -> Tensor:
        each = torch.stack([one(chunks, query) for one in scores])
        spread = each.std(dim=1, keepdim=True) if len(chunks) > 1 else torch.ones(len(each), 1)
        return ((each - each.mean(dim=1, keepdim=True)) / spread.clamp_min(1e-6)).sum(dim=0)

    return score
