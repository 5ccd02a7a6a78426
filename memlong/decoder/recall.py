"""From a query to the chunks that a row attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memlong.bank import Draft, MemoryBank, Retrieved, SearchResult
from memlong.bank.copying import to_device
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


@dataclass(frozen=True)
class RandomChunks:
    """Now and then, chunks at random in place of those that were asked for: what training tells memory from.

    Parameters
    ----------
    share
        Share of retrievals that it befalls, from 0 to 1.
    generator
        Decides when, and which chunks.
    """

    share: float
    generator: torch.Generator

    def due(self) -> bool:
        """Whether the next retrieval is one of them."""
        return float(torch.rand(1, generator=self.generator, dtype=torch.float32, device="cpu")) < self.share

    def recall(
        self, bank: MemoryBank, query: Tensor, config: MemoryConfig
    ) -> tuple[Retrieval, RowMemory | None]:
        """Take as many chunks as :func:`recall` would look for, any of the bank's, in the order of the text."""
        stored = bank.ids
        some = torch.randperm(len(stored), generator=self.generator, device="cpu")[: config.retrieved_chunks]
        ids = stored[some].sort().values
        chunks = bank.fetch(ids)
        memory = RowMemory(_in_line(chunks.keys), _in_line(chunks.values), chunks.spans) if len(ids) else None
        return Retrieval(query, ids, torch.zeros(len(ids), dtype=torch.float32, device="cpu")), memory


def recall(
    bank: MemoryBank | Draft, query: Tensor, config: MemoryConfig
) -> tuple[Retrieval, RowMemory | None]:
    """Retrieve chunks for a query's embedding [dim], and put together what is attended to.

    The memory is None if nothing was found that is near enough.
    """
    most = min(config.retrieved_chunks, len(bank))
    if config.neighbours:
        return _recall_with_neighbours(bank, query, most, config)
    found = bank.retrieve(query[None], most)
    retrieval = _retrieval(query, found)
    near = _near(retrieval, config)
    if not near:
        return retrieval, None
    # Chunks leave the window in the order of the text, so that is the order of ids.
    order = (
        torch.arange(near, device="cpu").flip(0)
        if config.chunk_order == "score"
        else retrieval.ids[:near].argsort()
    )
    keys, values = (
        _in_line(states[0], to_device(order, states.device)) for states in (found.keys, found.values)
    )
    return retrieval, RowMemory(keys, values, found.spans[0, order])


def _recall_with_neighbours(
    bank: MemoryBank | Draft, query: Tensor, most: int, config: MemoryConfig
) -> tuple[Retrieval, RowMemory | None]:
    retrieval = _retrieval(query, bank.search(query[None], most))
    hits = retrieval.ids[: _near(retrieval, config)].tolist()
    chosen: list[int] = []
    following = min(config.neighbours, most - 1)  # more would find no room
    for hit in hits:
        group = [each for each in _with_what_follows(bank, hit, following) if each not in chosen]
        group = group[: most - len(chosen)]
        chosen = [*group, *chosen]  # the best ends up next to the window
    if config.chunk_order == "position":
        chosen.sort()
    chunks = bank.fetch(chosen)
    if not len(chunks.ids):
        return retrieval, None
    return retrieval, RowMemory(_in_line(chunks.keys), _in_line(chunks.values), chunks.spans)


def _with_what_follows(bank: MemoryBank | Draft, hit: int, count: int) -> list[int]:
    """The chunk, and up to ``count`` after it in its text; the bank may hold several texts."""
    ids = list(range(hit, hit + count + 1))
    spans = bank.spans_of(ids).tolist()
    whole = 1
    while whole <= count and spans[whole][0] == spans[whole - 1][1]:
        whole += 1
    return ids[:whole]


def _retrieval(query: Tensor, found: Retrieved | SearchResult) -> Retrieval:
    count = int((found.ids[0] >= 0).sum())
    return Retrieval(query, found.ids[0, :count], found.scores[0, :count])


def _near(retrieval: Retrieval, config: MemoryConfig) -> int:
    """Return how many of the chunks found, the best first, are near enough."""
    if config.min_score is None:
        return len(retrieval.ids)
    return int((retrieval.scores >= config.min_score).sum())


def _in_line(blocks: Tensor, order: Tensor | None = None) -> Tensor:
    """[chunks, layers, kv_heads, chunk, head_dim] -> [layers, kv_heads, tokens, head_dim], in one copy."""
    side_by_side = blocks.permute(1, 2, 0, 3, 4)
    return (side_by_side if order is None else side_by_side.index_select(2, order)).flatten(2, 3)
