"""Find out which chunks a memory's index retrieves, without running the model.

Embeddings depend on the text alone, not on what the model retrieves, so the queries of one system can be replayed
against the index of another. Systems that find the same chunks for every segment give the same result and need only
one run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memlong import MemoryConfig, Passage, Registry, Retriever

Asked = list[tuple[str, tuple[Passage, ...]]]
Found = tuple[tuple[int, ...], ...]

STORE, SEARCH = "store", "search"


class RememberingRetriever(Retriever):
    """Caches embeddings, and records the order in which passages were stored and searched for.

    Parameters
    ----------
    retriever
        Computes the embeddings.
    """

    def __init__(self, retriever: Retriever) -> None:
        super().__init__(retriever.model, retriever.tokenizer)
        self.metric = retriever.metric  # type: ignore[misc] - the metric of the wrapped retriever
        self._retriever = retriever
        self._known: dict[tuple[str, Passage], Tensor] = {}
        self.asked: Asked = []

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._retriever.dim

    def embed_chunks(self, chunks: Sequence[Passage]) -> Tensor:
        """Embeddings of the chunks [chunks, dim]."""
        self.asked.append((STORE, tuple(chunks)))
        return self.cached(STORE, chunks)

    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """Embeddings of the queries [queries, dim]."""
        self.asked.append((SEARCH, tuple(queries)))
        return self.cached(SEARCH, queries)

    def cached(self, kind: str, passages: Sequence[Passage]) -> Tensor:
        """Embeddings of passages that are stored or searched for, without recording them."""
        new = [passage for passage in passages if (kind, passage) not in self._known]
        if new:
            embed = self._retriever.embed_chunks if kind == STORE else self._retriever.embed_queries
            for passage, embedding in zip(new, embed(new), strict=True):
                self._known[kind, passage] = embedding
        return torch.stack([self._known[kind, passage] for passage in passages])


def chunks_found(
    config: MemoryConfig, asked: Asked, retriever: RememberingRetriever, registry: Registry
) -> Found:
    """Replay recorded requests against another index, and return the ids that it finds for each search, in order."""
    if config.backend is None:
        raise ValueError("config.backend must name a backend, got None")
    bank = registry.create_bank(
        config.backend, retriever.dim, metric=retriever.metric, **config.backend_options
    )
    found = []
    for kind, passages in asked:
        if kind == STORE:
            block = torch.zeros(len(passages), 1, 1, 1, 1)  # placeholder K-V: only the embeddings matter
            spans = [(passage.end - config.chunk_size, passage.end) for passage in passages]
            bank.add(retriever.cached(kind, passages), block, block, spans)
        else:
            depth = min(config.top_k, len(bank))
            ids = bank.retrieve(retriever.cached(kind, passages), depth).ids.tolist()
            found += [tuple(sorted(each)) for each in ids]
    return tuple(found)
