"""From a query to the chunks that a stream attends to."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Self

import torch
from torch import Tensor

from memlong.bank import Chunks, Draft, MemoryBank
from memlong.decoder.arrays import Ints
from memlong.decoder.config import MemoryConfig


@dataclass(frozen=True)
class Retrieval:
    """What one stream retrieved for one segment.

    Attributes
    ----------
    query
        Its embedding [dim].
    ids, scores
        Of the chunks found [found], best first; where two queries searched, in turn those of either.
    """

    query: Tensor
    ids: Tensor
    scores: Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """Keys and values of a chunk, un-rotated, [layers, kv_heads, chunk, head_dim] each; never changed."""

    keys: Tensor
    values: Tensor


Placed = tuple[Block, Ints]
"""A chunk, and the positions [chunk] of its tokens."""


@dataclass(frozen=True)
class StreamMemory:
    """Retrieved chunks of one stream, in the order of the text.

    Attributes
    ----------
    blocks
        Of each chunk.
    spans
        Its tokens [chunks, 2].
    ids
        Its id; empty where they are not known.
    """

    blocks: tuple[Block, ...]
    spans: Tensor
    ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, spans: Tensor) -> Self:
        """Take chunks of which keys and values are [layers, kv_heads, tokens, head_dim]."""
        sides = zip(*(states.chunk(len(spans), dim=2) for states in (keys, values)), strict=True)
        return cls(tuple(Block(*side) for side in sides), spans)

    @property
    def tokens(self) -> int:
        """Number of retrieved tokens."""
        return sum(block.keys.shape[2] for block in self.blocks)

    @property
    def keys(self) -> Tensor:
        """Keys of all chunks, joined in one copy [layers, kv_heads, tokens, head_dim]."""
        return torch.cat([block.keys for block in self.blocks], dim=2)

    @property
    def values(self) -> Tensor:
        """Values of all chunks, as `keys`."""
        return torch.cat([block.values for block in self.blocks], dim=2)


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
        found = bank.fetch(ids)
        scores = torch.zeros(len(found.ids), dtype=torch.float32, device="cpu")
        return Retrieval(query, found.ids, scores), _memory(found, None)


def retrieve_chunks(
    bank: MemoryBank | Draft,
    query: Tensor,
    config: MemoryConfig,
    before: StreamMemory | None = None,
    focus: Tensor | None = None,
) -> tuple[Retrieval, StreamMemory | None]:
    """Retrieve chunks for a query's embedding [dim], and in turn for that of a second query; None if nothing was found.

    Those that ``before`` holds, from the same bank, are not read again.
    """
    scores = _search(bank, query, config.top_k)
    if focus is not None and bool(focus.any()):
        scores = _in_turn(scores, _search(bank, focus, config.top_k), config.top_k)
    known = set() if before is None else set(before.ids)
    ids = list(scores)
    new = [each for each in ids if each not in known]
    if isinstance(bank, Draft):
        chunks = bank.fetch(new)
    else:
        chunks = bank.fetch(new, known=[each for each in ids if each in known])
    gone = set(new) - set(chunks.ids.tolist())  # they have left the bank since the search
    held = [each for each in ids if each not in gone]
    retrieval = Retrieval(
        query,
        torch.tensor(held, dtype=torch.int64, device="cpu"),
        torch.tensor([scores[each] for each in held], dtype=torch.float32, device="cpu"),
    )
    # Chunks leave the window in the order of the text, so that is the order of ids.
    return retrieval, _memory(chunks, before, retrieval.ids.sort().values)


def _search(bank: MemoryBank | Draft, query: Tensor, top_k: int) -> dict[int, float]:
    """Return ids and scores of the chunks found, best first."""
    found = bank.search(query[None], max(1, min(top_k, len(bank))))
    each = zip(found.ids[0].tolist(), found.scores[0].tolist(), strict=True)
    return {chunk: score for chunk, score in each if chunk >= 0}


def _in_turn(first: dict[int, float], second: dict[int, float], most: int) -> dict[int, float]:
    """Take the best of either, again and again, each chunk once."""
    found: dict[int, float] = {}
    for pair in zip_longest(first.items(), second.items()):
        for chunk, score in filter(None, pair):
            found.setdefault(chunk, score)
    return dict(list(found.items())[:most])


def _memory(chunks: Chunks, before: StreamMemory | None, ids: Tensor | None = None) -> StreamMemory | None:
    """Join chunks that were fetched and those of ``ids``, ascending, that were there before."""
    wanted = (chunks.ids if ids is None else ids).tolist()
    if not wanted:
        return None
    blocks, spans = {}, {}
    if before is not None:
        blocks = dict(zip(before.ids, before.blocks, strict=False))
        spans = dict(zip(before.ids, before.spans, strict=False))
    # Copies, unless it is one: a chunk that stays shall not hold on to those that came with it.
    alone = len(chunks.ids) == 1
    for row, each in enumerate(chunks.ids.tolist()):
        keys, values = chunks.keys[row], chunks.values[row]
        blocks[each] = Block(keys, values) if alone else Block(keys.clone(), values.clone())
        spans[each] = chunks.spans[row]
    return StreamMemory(
        tuple(blocks[each] for each in wanted), torch.stack([spans[each] for each in wanted]), tuple(wanted)
    )
