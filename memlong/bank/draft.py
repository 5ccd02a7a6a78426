"""A draft of a bank: the bank, and chunks on top of it that are never added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from memlong.bank.arrays import FloatInput, Floats, IntInput
from memlong.bank.base import MemoryBank
from memlong.bank.finite import Finiteness
from memlong.bank.index.exact import true_scores
from memlong.bank.metric import Metric, similarity_of
from memlong.bank.results import Chunks, SearchResult
from memlong.bank.store.copying import stack
from memlong.bank.uncopied import Uncopied
from memlong.bank.validate import blocks_of, embeddings_of, ids_of, spans_of, whole_number
from memlong.errors import InvalidArgumentError

_FIRST_ID = 1 << 61  # beyond those of any bank, however it grows


@dataclass(frozen=True, eq=False)
class _Chunk:
    """One chunk of a draft; never changed, so that drafts can share it."""

    id: int
    embedding: Floats
    keys: torch.Tensor
    values: torch.Tensor
    span: torch.Tensor


class Draft(Uncopied):
    """What a beam remembers: a bank, and the chunks of a continuation that will be dropped.

    The draft's own chunks stay where they were made, whatever the bank's store and capacity, and are searched by brute
    force: a continuation is short, so they are few. Fetching counts in the bank as it always does; nothing is
    ever added to it.

    Parameters
    ----------
    bank : MemoryBank
        What lies below.
    """

    why_uncopied = "it lies over a bank. Fork it, or copy the bank"

    def __init__(self, bank: MemoryBank) -> None:
        self._bank = bank
        self._chunks: list[_Chunk] = []
        self._next_id = _FIRST_ID
        self._unproven: Finiteness | None = None
        self._proven = 0  # chunks before those

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._bank.dim

    @property
    def metric(self) -> Metric:
        """What is near."""
        return self._bank.metric

    @property
    def bank(self) -> MemoryBank:
        """What lies below."""
        return self._bank

    @staticmethod
    def is_own(chunk_id: int) -> bool:
        """Whether an id is that of a draft's own chunk, which no bank has."""
        return chunk_id >= _FIRST_ID

    @property
    def next_id(self) -> int:
        """The id that the next chunk gets. Ids are above all of the bank's, and never used again."""
        return self._next_id

    @property
    def ids(self) -> torch.Tensor:
        """Ids of all chunks [len], int64, ascending."""
        own = torch.tensor([chunk.id for chunk in self._chunks], dtype=torch.int64, device="cpu")
        return torch.cat([self._bank.ids, own])

    def mean_embedding(self) -> torch.Tensor:
        """Return the mean of the embeddings of bank and draft; as `MemoryBank.mean_embedding`."""
        own = [chunk.embedding for chunk in self._chunks]
        return self._bank.mean_embedding(np.stack(own) if own else None)

    def __len__(self) -> int:
        return len(self._bank) + len(self._chunks)

    def fork(self) -> Self:
        """Return an independent copy of this draft over the same bank."""
        other = type(self)(self._bank)
        vars(other).update(vars(self), _chunks=list(self._chunks))
        return other

    def add(
        self,
        embeddings: FloatInput,
        keys: FloatInput,
        values: FloatInput,
        spans: IntInput,
        *,
        check_first: bool = True,
    ) -> None:
        """Keep chunks; same arguments and errors as `MemoryBank.add`."""
        if self._unproven is not None:
            try:
                self._unproven.require()
            except InvalidArgumentError:
                self._chunks = self._chunks[: self._proven]
                raise
            finally:
                self._unproven = None
        vectors = embeddings_of("embeddings", embeddings, self.dim, unit=self.metric == "cosine")
        key_blocks, value_blocks = blocks_of(keys, values, len(vectors))
        places = torch.from_numpy(spans_of(spans, len(vectors)))
        finiteness = Finiteness(key_blocks, value_blocks)
        if check_first or finiteness.is_known:
            finiteness.require()
        else:
            self._unproven, self._proven = finiteness, len(self._chunks)
        ids = range(self._next_id, self._next_id + len(vectors))
        self._chunks += map(_Chunk, ids, vectors, key_blocks, value_blocks, places)
        self._next_id += len(vectors)

    def search(self, queries: FloatInput, k: int, *, among: IntInput | None = None) -> SearchResult:
        """Find the k best chunks of one query [1, dim] in bank and draft together; as `MemoryBank.search`.

        `among` says which of the bank's chunks may be found. The draft's own may be in any case: they are the
        continuation itself, of which no choice of the bank's chunks can know.
        """
        k = whole_number("k", k, at_least=1)
        below = self._bank.search(queries, k, among=among)
        if not self._chunks:
            return below
        query = embeddings_of("queries", queries, self.dim, unit=self.metric == "cosine")
        vectors = np.stack([chunk.embedding for chunk in self._chunks])[None]
        own = torch.from_numpy(true_scores(query, vectors, similarity_of(self.metric)))
        scores, order = torch.cat([below.scores, own], dim=1).sort(dim=1, descending=True, stable=True)
        mine = torch.tensor([chunk.id for chunk in self._chunks], device="cpu")
        ids = torch.cat([below.ids[0], mine])
        return SearchResult(scores[:, :k], ids[order[:, :k]])

    def spans_of(self, ids: IntInput) -> torch.Tensor:
        """Return the token positions of chunks; as `MemoryBank.spans_of`."""
        wanted, own = ids_of(ids), self._own()
        spans = self._bank.spans_of(wanted)
        for row, chunk_id in enumerate(wanted.tolist()):
            if chunk_id in own:
                spans[row] = own[chunk_id].span
        return spans

    def embeddings_of(self, ids: IntInput) -> torch.Tensor:
        """Return the embeddings of chunks; as `MemoryBank.embeddings_of`."""
        wanted, own = ids_of(ids), self._own()
        found = self._bank.embeddings_of(wanted)
        for row, chunk_id in enumerate(wanted.tolist()):
            if chunk_id in own:
                found[row] = torch.from_numpy(own[chunk_id].embedding)
        return found

    def fetch(self, ids: IntInput, *, known: IntInput = ()) -> Chunks:
        """Return chunks by id, those of the bank counted there; as `MemoryBank.fetch`."""
        wanted, others = ids_of(ids), ids_of(known)
        own = self._own()
        below = self._bank.fetch(wanted[wanted < _FIRST_ID], known=others[others < _FIRST_ID])
        rows = {chunk_id: row for row, chunk_id in enumerate(below.ids.tolist())}
        held = [chunk_id for chunk_id in wanted.tolist() if chunk_id in rows or chunk_id in own]
        if not any(chunk_id in own for chunk_id in held):
            return below
        parts = [
            (own[each].keys, own[each].values, own[each].span)
            if each in own
            else (below.keys[rows[each]], below.values[rows[each]], below.spans[rows[each]])
            for each in held
        ]
        keys, values, spans = (stack([part[side] for part in parts]) for side in range(3))
        return Chunks(torch.tensor(held, dtype=torch.int64, device="cpu"), keys, values, spans)

    def _own(self) -> dict[int, _Chunk]:
        return {chunk.id: chunk for chunk in self._chunks}
