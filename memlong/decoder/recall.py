"""From a query to the chunks that a row attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memlong.bank import Draft, MemoryBank, Retrieved, SearchResult
from memlong.decoder.config import MemoryConfig


@dataclass(frozen=True)
class Retrieval:
    """What one row retrieved for one segment.

    Attributes
    ----------
    query
        Its embedding [dim].
    ids, scores
        Of the chunks found [found], best first, whether or not they are near enough to be attended to.
    """

    query: Tensor
    ids: Tensor
    scores: Tensor


@dataclass(frozen=True)
class RowMemory:
    """Retrieved K-V of one row, un-rotated, chunks in the order in which they stand.

    ``keys`` and ``values`` are [layers, kv_heads, tokens, head_dim]; ``spans`` is [chunks, 2].
    """

    keys: Tensor
    values: Tensor
    spans: Tensor

    @property
    def tokens(self) -> int:
        """Number of retrieved tokens."""
        return int(self.keys.shape[2])


def recall(
    bank: MemoryBank | Draft, query: Tensor, config: MemoryConfig
) -> tuple[Retrieval, RowMemory | None]:
    """Retrieve chunks for a query's embedding [dim], and put together what is attended to.

    The memory is None if nothing was found that is near enough.
    """
    if config.neighbours:
        return _recall_with_neighbours(bank, query, config)
    found = bank.retrieve(query[None], config.retrieved_chunks)
    retrieval = _retrieval(query, found)
    near = _near(retrieval, config)
    if not near:
        return retrieval, None
    return retrieval, _memory(found.keys[0, :near], found.values[0, :near], found.spans[0, :near], config)


def _recall_with_neighbours(
    bank: MemoryBank | Draft, query: Tensor, config: MemoryConfig
) -> tuple[Retrieval, RowMemory | None]:
    retrieval = _retrieval(query, bank.search(query[None], config.retrieved_chunks))
    hits = retrieval.ids[: _near(retrieval, config)].tolist()
    # Chunks leave the window in the order of the text, so the next id is what follows.
    wanted = dict.fromkeys(hit + step for hit in hits for step in range(config.neighbours + 1))
    chunks = bank.fetch(list(wanted)[: config.retrieved_chunks])
    ends = dict(zip(chunks.ids.tolist(), chunks.spans[:, 1].tolist(), strict=True))
    kept = [
        row
        for row, (chunk_id, start) in enumerate(zip(ends, chunks.spans[:, 0].tolist(), strict=True))
        if chunk_id in hits or ends.get(chunk_id - 1) == start  # the bank may hold several texts
    ]
    if not kept:
        return retrieval, None
    return retrieval, _memory(chunks.keys[kept], chunks.values[kept], chunks.spans[kept], config)


def _retrieval(query: Tensor, found: Retrieved | SearchResult) -> Retrieval:
    count = int((found.ids[0] >= 0).sum())
    return Retrieval(query, found.ids[0, :count], found.scores[0, :count])


def _near(retrieval: Retrieval, config: MemoryConfig) -> int:
    """Return how many of the chunks found, the best first, are near enough."""
    if config.min_score is None:
        return len(retrieval.ids)
    return int((retrieval.scores >= config.min_score).sum())


def _memory(keys: Tensor, values: Tensor, spans: Tensor, config: MemoryConfig) -> RowMemory:
    """Line up chunks that come best first: by place in the text, or the best nearest to the window."""
    count = len(spans)
    order = torch.arange(count).flip(0) if config.chunk_order == "score" else spans[:, 0].argsort()
    return RowMemory(_in_line(keys, order), _in_line(values, order), spans[order])


def _in_line(blocks: Tensor, order: Tensor) -> Tensor:
    """[chunks, layers, kv_heads, chunk, head_dim] -> [layers, kv_heads, tokens, head_dim], chunks in this order."""
    chosen = blocks.index_select(0, order.to(blocks.device))
    return chosen.permute(1, 2, 0, 3, 4).flatten(2, 3)
