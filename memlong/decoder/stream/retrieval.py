"""From a query to the chunks that a stream attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memlong.bank import Draft, MemoryBank, SearchResult
from memlong.decoder.config import MemoryConfig


@dataclass(frozen=True)
class Retrieval:
    """What one stream retrieved for one segment.

    Attributes
    ----------
    query
        Its embedding [dim].
    ids
        Of the chunks found [found]: the best for the query first, and the fourth of eight the best for its ending, if
        the retriever embeds that and the chunk stands out there.
    scores
        Of the best chunks for the query alone [found].
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


_PLACE, _EVERY = 3, 8  # the fourth of eight chunks
_STANDS_OUT = 1.5


def retrieve_chunks(
    bank: MemoryBank | Draft, query: Tensor, config: MemoryConfig, ending: Tensor | None = None
) -> tuple[Retrieval, StreamMemory | None]:
    """Retrieve chunks for the embeddings [dim] of a query and its ending, and join their K-V; None if none is found."""
    k = min(config.top_k, len(bank))
    found = bank.search(query[None], k)
    count = int((found.ids[0] >= 0).sum())
    ids = found.ids[0, :count]
    if ending is not None and _PLACE < count < len(bank):
        ids = _with_others(ids, bank.search(ending[None], k))
    # Chunks leave the window in the order of the text, so that is the order of ids.
    chunks = bank.fetch(ids.sort().values)
    retrieval = Retrieval(query, ids[torch.isin(ids, chunks.ids)], found.scores[0, :count])
    if not len(chunks.ids):
        return retrieval, None
    return retrieval, StreamMemory(_in_line(chunks.keys), _in_line(chunks.values), chunks.spans)


def _with_others(ids: Tensor, second: SearchResult) -> Tensor:
    """As many ids [found], but the fourth of eight from a second search, if it stands out among all that this found."""
    scores = second.scores[0][second.ids[0] >= 0]
    standing_out = second.ids[0, : len(scores)][scores > _STANDS_OUT * scores[-1:].clamp_min(0)]
    first, others = ids.tolist(), standing_out.tolist()
    taken: list[int] = []
    while len(taken) < len(ids):
        queue = others if others and len(taken) % _EVERY == _PLACE else first
        new = queue.pop(0)
        if new not in taken:
            taken.append(new)
    return torch.tensor(taken, dtype=torch.int64, device="cpu")


def _in_line(blocks: Tensor) -> Tensor:
    """[chunks, layers, kv_heads, chunk, head_dim] -> [layers, kv_heads, tokens, head_dim], in one copy."""
    return blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)
