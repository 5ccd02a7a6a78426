"""From a query to the chunks that a stream attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memlong.bank import Draft, MemoryBank
from memlong.bank.store.copying import to_device
from memlong.decoder.config import MemoryConfig


@dataclass(frozen=True)
class Retrieval:
    """What one stream retrieved for one segment.

    Attributes
    ----------
    query
        Its embedding [dim].
    ids, scores
        Of the chunks found [found], best first.
    """

    query: Tensor
    ids: Tensor
    scores: Tensor


@dataclass(frozen=True)
class StreamMemory:
    """Retrieved K-V of one stream, un-rotated, with chunks in the order of the text.

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
    """Retrieves random chunks now and then, so that training has something to tell memory from.

    Parameters
    ----------
    share
        Share of retrievals that are random, from 0 to 1.
    generator
        Decides when, and which chunks.
    """

    share: float
    generator: torch.Generator

    def due(self) -> bool:
        """Whether the next retrieval is random."""
        return float(torch.rand(1, generator=self.generator, dtype=torch.float32, device="cpu")) < self.share

    def retrieve(
        self, bank: MemoryBank, query: Tensor, config: MemoryConfig
    ) -> tuple[Retrieval, StreamMemory | None]:
        """Take as many of the bank's chunks as `retrieve_chunks` would, at random, in the order of the text."""
        stored = bank.ids
        some = torch.randperm(len(stored), generator=self.generator, device="cpu")[: config.top_k]
        ids = stored[some].sort().values
        chunks = bank.fetch(ids)
        memory = (
            StreamMemory(_in_line(chunks.keys), _in_line(chunks.values), chunks.spans) if len(ids) else None
        )
        return Retrieval(query, ids, torch.zeros(len(ids), dtype=torch.float32, device="cpu")), memory


def retrieve_chunks(
    bank: MemoryBank | Draft, query: Tensor, config: MemoryConfig
) -> tuple[Retrieval, StreamMemory | None]:
    """Retrieve chunks for a query's embedding [dim], and join their K-V; None if nothing was found."""
    found = bank.retrieve(query[None], min(config.top_k, len(bank)))
    count = int((found.ids[0] >= 0).sum())
    retrieval = Retrieval(query, found.ids[0, :count], found.scores[0, :count])
    if not count:
        return retrieval, None
    # Chunks leave the window in the order of the text, so that is the order of ids.
    order = retrieval.ids.argsort()
    keys, values = (
        _in_line(states[0], to_device(order, states.device)) for states in (found.keys, found.values)
    )
    return retrieval, StreamMemory(keys, values, found.spans[0, order])


def _in_line(blocks: Tensor, order: Tensor | None = None) -> Tensor:
    """[chunks, layers, kv_heads, chunk, head_dim] -> [layers, kv_heads, tokens, head_dim], in one copy."""
    side_by_side = blocks.permute(1, 2, 0, 3, 4)  # [layers, kv_heads, chunks, chunk, head_dim]
    return (side_by_side if order is None else side_by_side.index_select(2, order)).flatten(2, 3)
