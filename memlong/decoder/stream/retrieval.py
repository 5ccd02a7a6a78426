"""From a query to the chunks that a stream attends to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from memlong.bank import Chunks, Draft, MemoryBank
from memlong.decoder.arrays import Ints
from memlong.decoder.config import MemoryConfig
from memlong.decoder.kv.null_chunk import null_span
from memlong.decoder.retrievers.base import Candidates, Passage, Retriever
from memlong.errors import InvalidArgumentError


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
        Its id, −1 of one that is not the bank's; empty where they are not known.
    """

    blocks: tuple[Block, ...]
    spans: Tensor
    ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, spans: Tensor, ids: Sequence[int] = ()) -> Self:
        """Take chunks of which keys and values are [layers, kv_heads, tokens, head_dim]."""
        sides = zip(*(states.chunk(len(spans), dim=2) for states in (keys, values)), strict=True)
        return cls(tuple(Block(*side) for side in sides), spans, tuple(ids))

    @classmethod
    def of_chunks(cls, chunks: Chunks) -> Self | None:
        """Take chunks in their order; None of none."""
        if not len(chunks.ids):
            return None
        ids = chunks.ids.tolist()
        blocks = tuple(Block(*sides) for sides in zip(chunks.keys, chunks.values, strict=True))
        return cls(blocks, chunks.spans, tuple(ids))

    def after(self, first: Block) -> StreamMemory:
        """Return this memory after a null chunk, whose id is −1."""
        spans = torch.cat([null_span(first.keys.shape[2]), self.spans])
        return StreamMemory((first, *self.blocks), spans, (-1, *self.ids) if self.ids else ())

    def with_blocks(self, blocks: Mapping[int, Block]) -> StreamMemory:
        """Return this memory with other blocks of some chunks, by id."""
        if not self.ids:
            return self
        both = zip(self.ids, self.blocks, strict=True)
        return replace(self, blocks=tuple(blocks.get(each, block) for each, block in both))

    @property
    def tokens(self) -> int:
        """Number of retrieved tokens."""
        return sum(block.keys.shape[2] for block in self.blocks)

    @property
    def keys(self) -> Tensor:
        """Keys of all chunks, joined in one copy [layers, kv_heads, tokens, head_dim]."""
        return joined_states([block.keys for block in self.blocks])

    @property
    def values(self) -> Tensor:
        """Values of all chunks, as `keys`."""
        return joined_states([block.values for block in self.blocks])


def joined_states(states: Sequence[Tensor]) -> Tensor:
    """Join [layers, kv_heads, tokens, head_dim] in the dtype of the last; training keeps a null chunk in float32."""
    return torch.cat([each.to(states[-1].dtype) for each in states], dim=2)


@dataclass(frozen=True)
class Reranking:
    """How a retriever chooses from what a bank finds.

    Attributes
    ----------
    retriever
        Has `Retriever.candidates`.
    query
        The passage that asks.
    """

    retriever: Retriever
    query: Passage

    def best(
        self, bank: MemoryBank | Draft, query: Tensor, k: int, cutoff: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Return ids and scores [found] of at most k chunks for a query's embedding [dim], best first.

        Candidates are those that the bank scores at least ``cutoff`` times as high as its best one.

        Raises
        ------
        InvalidArgumentError
            If the retriever does not return a score for each candidate.
        """
        ids, scores = _found(bank, query, max(k, min(self.retriever.candidates, len(bank))), cutoff)
        order = ids.argsort()
        ids, scores = ids[order], scores[order]
        embeddings, spans = bank.embeddings_of(ids), bank.spans_of(ids)
        held = spans[:, 0] >= 0  # the others are missing, or have left the bank since the search
        if not held.any():
            return ids[held], scores[held]
        asked = torch.as_tensor(query, dtype=torch.float32, device="cpu").detach()
        candidates = Candidates(self.query, asked, *(each[held] for each in (ids, scores, embeddings, spans)))
        anew = torch.as_tensor(self.retriever.rerank(candidates), device="cpu").detach()
        if anew.shape != candidates.ids.shape or anew.isnan().any():
            raise InvalidArgumentError(
                f"rerank of {type(self.retriever).__name__} must return a number for each of {len(candidates)} "
                f"candidates, got {anew!r:.80}"
            )
        kept = anew.sort(descending=True, stable=True).indices[:k]
        kept = kept[anew[kept] > -torch.inf]
        return candidates.ids[kept], anew[kept].float()


@dataclass(frozen=True)
class Search:
    """What one stream looks for, and where.

    Attributes
    ----------
    bank
        Its own.
    query
        The query's embedding [dim].
    config
        Says how many chunks to choose.
    others
        The banks of the other rows, from the next row on.
    reranking
        How the retriever chooses from what the bank finds, if it does.
    """

    bank: MemoryBank | Draft
    query: Tensor
    config: MemoryConfig
    others: Sequence[MemoryBank | Draft] = ()
    reranking: Reranking | None = None

    def best(self) -> Retrieval:
        """Return what the retriever would retrieve."""
        ids, scores = _best(self.bank, self.query, self.config, self.reranking)
        return Retrieval(self.query, ids[ids >= 0], scores[ids >= 0])


class Choice(Protocol):
    """Chooses chunks in a retriever's place, as training does."""

    def choose(self, search: Search) -> tuple[Retrieval, Chunks] | None:
        """Choose chunks; None to have them retrieved as usual.

        Returns
        -------
        tuple or None
            What of the bank was found, and the chunks to attend to, in this order; −1 is the id of one that is not the
            bank's.
        """


def _best(
    bank: MemoryBank | Draft, query: Tensor, config: MemoryConfig, reranking: Reranking | None
) -> tuple[Tensor, Tensor]:
    """Return ids and scores [found] of at most ``top_k`` chunks, best first; −1 for none."""
    k = max(1, min(config.top_k, len(bank)))
    if reranking is not None:
        return reranking.best(bank, query, k, config.answer_cutoff)
    return _found(bank, query, k, config.answer_cutoff)


def _found(bank: MemoryBank | Draft, query: Tensor, k: int, cutoff: float) -> tuple[Tensor, Tensor]:
    """Return ids and scores [found] of at most k chunks, best first: those with such a share of the best one's score.

    A best one that is not similar to the query at all sets no bound.
    """
    result = bank.search(query[None], k)
    ids, scores = result.ids[0], result.scores[0]
    if not cutoff or scores[0] <= 0:
        return ids, scores
    kept = scores >= cutoff * scores[0]
    return ids[kept], scores[kept]


def retrieve_chunks(
    bank: MemoryBank | Draft,
    query: Tensor,
    config: MemoryConfig,
    before: StreamMemory | None = None,
    reranking: Reranking | None = None,
) -> tuple[Retrieval, StreamMemory | None]:
    """Retrieve chunks for a query's embedding [dim]; None if nothing was found.

    Those that ``before`` holds, from the same bank, are not read again.
    """
    found, scores = _best(bank, query, config, reranking)
    known = set() if before is None else set(before.ids)
    ids = [each for each in found.tolist() if each >= 0]
    new = [each for each in ids if each not in known]
    chunks = bank.fetch(new, known=[each for each in ids if each in known])
    gone = set(new) - set(chunks.ids.tolist())  # they have left the bank since the search
    held = [place for place, each in enumerate(ids) if each not in gone]
    retrieval = Retrieval(query, found[held], scores[held])
    # Chunks leave the window in the order of the text, so that is the order of ids.
    return retrieval, _memory(chunks, before, retrieval.ids.sort().values)


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
