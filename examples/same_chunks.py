"""Which chunks a memory's index finds, told without the model.

What is embedded is text, so it is the same whatever the model reads of its memory: what one system asked of its index
can be put to the index of another. Systems that find the same chunks for every segment are one system to the model, and
need to run only once.
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
    """Embeds no passage twice, and notes in which order passages were stored and searched for.

    Parameters
    ----------
    retriever
        Makes the embeddings.
    """

    def __init__(self, retriever: Retriever) -> None:
        super().__init__(retriever.model, retriever.tokenizer)
        self.metric = retriever.metric  # type: ignore[misc] - that of the class it stands for
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
        return self.recalled(STORE, chunks)

    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """Embeddings of the queries [queries, dim]."""
        self.asked.append((SEARCH, tuple(queries)))
        return self.recalled(SEARCH, queries)

    def recalled(self, kind: str, passages: Sequence[Passage]) -> Tensor:
        """Embeddings of passages that are stored or searched for, without a note."""
        new = [passage for passage in passages if (kind, passage) not in self._known]
        if new:
            embed = self._retriever.embed_chunks if kind == STORE else self._retriever.embed_queries
            for passage, embedding in zip(new, embed(new), strict=True):
                self._known[kind, passage] = embedding
        return torch.stack([self._known[kind, passage] for passage in passages])


def chunks_found(
    config: MemoryConfig, asked: Asked, retriever: RememberingRetriever, registry: Registry
) -> Found:
    """Put to another index what was asked of one, and return the ids that it finds for each search, in order."""
    if config.backend is None:
        raise ValueError("config has backend=None, so nothing is searched")
    bank = registry.create_bank(
        config.backend, retriever.dim, metric=retriever.metric, **config.backend_options
    )
    found = []
    for kind, passages in asked:
        if kind == STORE:
            block = torch.zeros(len(passages), 1, 1, 1, 1)  # a memory of nothing, with the embeddings
            spans = [(passage.start, passage.end) for passage in passages]
            bank.add(retriever.recalled(kind, passages), block, block, spans)
        else:
            depth = min(config.top_k, len(bank))
            ids = bank.retrieve(retriever.recalled(kind, passages), depth).ids.tolist()
            found += [tuple(sorted(each)) for each in ids]
    return tuple(found)
