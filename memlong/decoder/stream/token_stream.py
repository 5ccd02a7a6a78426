"""One token stream: how far it has read, which chunks have left its window, and what it has retrieved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from memlong.bank import ChunkLayout, Draft, MemoryBank
from memlong.decoder.arrays import Bools, Ints
from memlong.decoder.config import MemoryConfig
from memlong.decoder.kv.null_chunk import NullChunk, retrieved_chunks
from memlong.decoder.persistence.saved_values import fact_of, tensor_of
from memlong.decoder.retrievers.base import Passage, Retriever
from memlong.decoder.stream.attention_record import HeldChunk
from memlong.decoder.stream.positions import Placement, memory_positions, placement_of
from memlong.decoder.stream.retrieval import (
    Block,
    Choice,
    Placed,
    Reranking,
    Retrieval,
    Search,
    StreamMemory,
    retrieve_chunks,
)

_MOST_IDS = 1 << 62


class TokenStream:
    """Bookkeeping of one stream. Tokens are counted from its start.

    Attributes
    ----------
    bank
        The stream's memory, or None for the plain window.
    bank_origin
        What the bank's chunks were made with, when it was last looked at.
    choice
        Chooses chunks in place of the retriever, or now and then; None for never.
    is_answer
        Whether what it reads is an answer, and not text that was given.
    memory, retrieval
        What the stream attends to, and how it was found; None for nothing.
    next_query
        The next query, if it is not the text just before the next segment.
    latest
        Un-rotated K-V of the latest chunks by id, if gradients are to reach what makes their stored form.
    storing_from
        The bank's next id when chunks were last given to it, until they have left the window.
    ahead
        Tokens read whose ids are still to be noted.
    """

    def __init__(
        self,
        config: MemoryConfig,
        bank: MemoryBank | Draft | None,
        choice: Choice | None = None,
        null_chunk: NullChunk | None = None,
    ) -> None:
        self.config = config
        # One block for all retrievals: it is brought to the model once.
        self._null_block = None if null_chunk is None else Block(null_chunk.keys, null_chunk.values)
        count = retrieved_chunks(config, beside_null_chunk=null_chunk is not None)
        self._answering = replace(config, top_k=count)
        self._reading = replace(self._answering, answer_cutoff=0.0)
        self.use_bank(bank)
        self.choice = choice
        self.is_answer = False
        self.memory: StreamMemory | None = None
        self.retrieval: Retrieval | None = None
        self._memory_from: ref[MemoryBank] | None = None  # the bank may be another one by now
        self.next_query: Passage | None = None
        self._is_given = False  # the next query
        self.ahead = 0
        self._departed = 0  # chunks that have left the window
        self._recent = Passage((), 0)  # the latest tokens, as far back as an embedding may reach

    def use_bank(self, bank: MemoryBank | Draft | None) -> None:
        """Continue with this bank."""
        self.bank = bank
        self.bank_origin = bank.origin if isinstance(bank, MemoryBank) else None
        self.storing_from: int | None = None
        self.latest: dict[int, Block] = {}
        self._before: StreamMemory | None = None  # what the bank gave last

    @property
    def seen(self) -> int:
        """Tokens read so far."""
        return self._recent.end + self.ahead

    @property
    def first_token(self) -> int:
        """The first token of the window after the sinks."""
        return self.config.sink_tokens + self._departed * self.config.chunk_size

    def begins_segment(self) -> bool:
        """Whether the next token begins a segment."""
        return self.seen % self.config.segment_size == 0

    @property
    def segment_rest(self) -> int:
        """Tokens that the current segment still takes."""
        return self.config.segment_size - self.seen % self.config.segment_size

    @property
    def placement(self) -> Placement:
        """Where the window is placed now."""
        return placement_of(self.config, self.first_token, self.memory.tokens if self.memory else 0)

    def keeps(self, tokens: Ints, reach: int | None = None) -> Bools:
        """Which tokens [columns], by index and −1 for padding, belong in the window.

        With a ``reach``, in the window of a layer whose tokens see that many, including themselves. It also keeps what
        tokens that may be taken back see.
        """
        if reach is not None:
            return (tokens >= self._first_seen(reach)) & (tokens < self.seen)
        kept = ((tokens >= 0) & (tokens < self.config.sink_tokens)) | (tokens >= self.first_token)
        return kept & (tokens < self.seen)

    def check_window(self, tokens: Ints, reach: int | None) -> None:
        """Raise ValueError unless a window of these tokens [columns], −1 for padding, holds all that the row keeps."""
        held = tokens[tokens != -1]
        if reach is None:
            needed = [*range(min(self.config.sink_tokens, self.seen)), *range(self.first_token, self.seen)]
        else:
            needed = [*range(self._first_seen(reach), self.seen)]
        if (held < 0).any() or (np.diff(held) <= 0).any() or held[self.keeps(held, reach)].tolist() != needed:
            raise ValueError(f"its window does not hold, in order, what precedes token {self.seen}")

    def _first_seen(self, reach: int) -> int:
        return max(0, self.seen + 1 - reach - self.config.segment_size)

    def fork(self) -> TokenStream:
        """Return an independent stream that continues from here; what it stores stays in a draft of the bank."""
        other = copy(self)
        other.choice = None  # a fork is never trained on
        if self.bank is not None:
            other.bank = self.bank.fork() if isinstance(self.bank, Draft) else Draft(self.bank)
        return other

    def take(self, token_ids: Sequence[int]) -> None:
        """Note the tokens of a forward call, or the ids of tokens read before."""
        self._recent = Passage((*self._recent.token_ids, *token_ids), self._recent.start)
        self.ahead = 0

    @property
    def retrieves(self) -> bool:
        """Whether it retrieves: answers and given queries do, and text that is read only if it is to."""
        return self._asks or self.config.retrieve_for == "all"

    @property
    def _asks(self) -> bool:
        return self.is_answer or self._is_given

    @property
    def space(self) -> int:
        """Tokens that the local window still takes before chunks must leave it."""
        return self.config.local_window - (self.seen - self.first_token)

    @property
    def is_full(self) -> bool:
        """Whether the local window is full."""
        return self.space <= 0

    def rewind(self, most: int | None) -> list[int]:
        """Take back the latest tokens, at most ``most``, to be read again with memory that they themselves ask for.

        None is all since the last segment began, at least one. The next query is the text that ends with them.
        """
        since = self.first_token if self._departed else 0
        if most is None:
            most = (self.seen - 1) % self.config.segment_size + 1
        count = min(most, self.seen - since)
        self.next_query = self.query()
        taken = self._passage(self.seen - count, self.seen)
        self._recent = self._passage(self._recent.start, taken.start)
        return list(taken.token_ids)

    def ask_with(self, token_ids: Sequence[int]) -> None:
        """Retrieve next with these tokens."""
        self.next_query = Passage(tuple(token_ids), self.seen)
        self._is_given = True

    def forget_query(self) -> None:
        """Retrieve with the latest text again."""
        self.next_query, self._is_given = None, False

    @property
    def is_focused(self) -> bool:
        """Whether the next query is focused on what few chunks hold: in answers, and where a query was given."""
        return self._asks and self.config.focus_tokens > 0

    def query(self) -> Passage:
        """The text just before the next segment."""
        if self.next_query is not None:
            return self.next_query
        length = self.config.answer_query_length if self.is_answer else self.config.query_length
        query = self._passage(max(self._recent.start, self.seen - length), self.seen)
        return replace(query, half_life=self.config.focus_tokens) if self.is_focused else query

    def departing(self, *, everything: bool = False) -> list[Passage]:
        """The chunks that must leave so that the next segment fits into the window, oldest first; or all whole ones."""
        size = self.config.chunk_size
        held = self.seen - self.first_token
        count = max(0, held // size if everything else -(-(held - self.config.window_past) // size))
        starts = range(self.first_token, self.first_token + count * size, size)
        return [self._passage(start, start + size) for start in starts]

    def embedded(self, chunk: Passage) -> Passage:
        """What the embedding of a chunk in the window covers."""
        start = max(self._recent.start, chunk.start - self.config.overlap_length)
        return self._passage(start, chunk.end)

    def tail(self) -> list[int]:
        """The tokens of the window, after its sinks."""
        return list(self._passage(min(self.first_token, self.seen), self.seen).token_ids)

    def has_stored(self, chunks: Sequence[Passage]) -> bool:
        """Whether the bank has these chunks already, from a call that failed before they left the window."""
        if self.bank is None or self.storing_from is None:
            return False
        end = min(self.storing_from + len(chunks), self.bank.next_id)
        spans = self.bank.spans_of(list(range(self.storing_from, end))).tolist()
        return [chunks[-1].start, chunks[-1].end] in spans

    def depart(self, count: int) -> None:
        """Note that ``count`` chunks have left, and forget text that is no longer needed."""
        self._departed += count
        self.storing_from = None
        query = max(self.config.query_length, self.config.answer_query_length)
        needed = min(self.first_token - self.config.overlap_length, self.seen - query)
        self._recent = self._passage(max(self._recent.start, needed), self.seen)

    def forget(self) -> None:
        """Drop what was retrieved for the last segment."""
        self.memory = self.retrieval = None

    def retrieve(
        self, query: Tensor, retriever: Retriever, others: Sequence[MemoryBank | Draft] = ()
    ) -> None:
        """Retrieve chunks for the embedding [dim] of its query; a choice may also look at the banks of other rows."""
        assert self.bank is not None  # noqa: S101 - the plain window retrieves nothing
        reranking = Reranking(retriever, self.query()) if retriever.candidates else None
        config = self._answering if self._asks else self._reading
        chosen = None
        if self.choice is not None:
            chosen = self.choice.choose(Search(self.bank, query, config, others, reranking))
        if chosen is not None:
            self.retrieval, chunks = chosen
            self.memory = StreamMemory.of_chunks(chunks)
        else:
            self.retrieval, self.memory = retrieve_chunks(self.bank, query, config, self._before, reranking)
        self._before = self.memory
        if self._null_block is not None and self.memory is not None:
            learns = self._null_block.keys.requires_grad
            self.memory = self.memory.after(copy(self._null_block) if learns else self._null_block)
        self._memory_from = self._weak_bank()

    def held_chunks(self) -> list[HeldChunk]:
        """The chunks of the memory, in its order."""
        if self.memory is None:
            return []
        spans: list[list[int]] = self.memory.spans.tolist()
        ids = [None if Draft.is_own(each) or each < 0 else each for each in self.memory.ids] or [None] * len(
            spans
        )
        return [
            HeldChunk(self._memory_from, each, (start, end))
            for each, (start, end) in zip(ids, spans, strict=True)
        ]

    def _weak_bank(self) -> ref[MemoryBank] | None:
        bank = self.bank.bank if isinstance(self.bank, Draft) else self.bank
        return None if bank is None else ref(bank)

    def memory_positions(self) -> Ints:
        """Positions [tokens] of the retrieved chunks."""
        if self.memory is None:
            return np.empty(0, dtype=np.int64)
        return memory_positions(self.config, self.placement, self.memory.spans.numpy())

    def placed_blocks(self) -> list[Placed]:
        """The retrieved chunks with their positions."""
        if self.memory is None:
            return []
        positions = self.memory_positions().reshape(len(self.memory.blocks), -1)
        return list(zip(self.memory.blocks, positions, strict=True))

    def facts(self) -> dict[str, int | bool | None]:
        """Return the part of the state that JSON can hold, for `restore`."""
        return {
            "departed": self._departed,
            "recent_start": self._recent.start,
            "storing_from": self.storing_from,
            "query_start": self.next_query.start if self._is_given and self.next_query is not None else None,
            "has_retrieved": self.retrieval is not None,
            "has_memory": self.memory is not None,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the rest of the state: the latest tokens, and what was retrieved."""
        found = {"recent": torch.tensor(self._recent.token_ids, dtype=torch.int64, device="cpu")}
        if self._is_given and self.next_query is not None:
            found["query"] = torch.tensor(self.next_query.token_ids, dtype=torch.int64, device="cpu")
        if self.retrieval is not None:
            found |= {f"retrieval.{name}": each for name, each in vars(self.retrieval).items()}
        if self.memory is not None:
            found |= {f"memory.{name}": getattr(self.memory, name) for name in ("keys", "values", "spans")}
        return found

    def restore(
        self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], block_layout: ChunkLayout
    ) -> None:
        """Continue from a saved stream; ValueError, KeyError or TypeError if none can have been in that state."""
        departed, start = fact_of(facts, "departed", int), fact_of(facts, "recent_start", int)
        recent = tensor_of(tensors, "recent", None).tolist()
        self._departed, self._recent = departed, Passage(tuple(recent), start)
        if departed < 0 or not 0 <= start <= self.first_token or (departed and self.first_token > self.seen):
            raise ValueError(
                f"a stream cannot be at token {self.seen}, and know the text from token {start} on, when {departed} "
                "chunks have left"
            )
        self.storing_from = fact_of(facts, "storing_from", int, type(None))
        if self.storing_from is not None and not 0 <= self.storing_from < _MOST_IDS:
            raise ValueError(f"storing_from must be the id of a chunk, got {self.storing_from}")
        self.forget_query()
        if facts.get("query_start") is not None:
            query_start = fact_of(facts, "query_start", int)
            query = Passage(tuple(tensor_of(tensors, "query", None).tolist()), query_start)
            if not query.token_ids or not 0 <= query_start <= self.seen:
                raise ValueError(f"a query of {len(query.token_ids)} tokens cannot be of token {query_start}")
            self.next_query, self._is_given = query, True
        elif "query" in tensors:
            raise ValueError("there is a query, but not where it was given")
        self.retrieval = self.memory = None
        if fact_of(facts, "has_retrieved", bool):
            ids = tensor_of(tensors, "retrieval.ids", None)
            self.retrieval = Retrieval(
                tensor_of(
                    tensors, "retrieval.query", None, like=torch.empty(0, dtype=torch.float32, device="cpu")
                ),
                ids,
                tensor_of(
                    tensors,
                    "retrieval.scores",
                    len(ids),
                    like=torch.empty(0, dtype=torch.float32, device="cpu"),
                ),
            )
        if fact_of(facts, "has_memory", bool):
            spans = tensor_of(tensors, "memory.spans", None, 2)
            layers, heads, size, width = block_layout.shape
            like = block_layout.empty(0)
            keys, values = (
                tensor_of(tensors, f"memory.{name}", layers, heads, len(spans) * size, width, like=like)
                for name in ("keys", "values")
            )
            # They stand in the order of ids, of which the retrieval has the same, best first.
            known = [] if self.retrieval is None else sorted(self.retrieval.ids.tolist())
            known = [-1] * int((spans[:1, 1] <= 0).sum()) + known  # a null chunk lies before the text
            self.memory = StreamMemory.of(keys, values, spans, known if len(known) == len(spans) else ())
            self._memory_from = self._weak_bank()

    def drop_changed(self) -> None:
        """Drop what was retrieved that the bank does not hold as it was: it has left, or is another bank's."""
        memory, retrieval = self.memory, self.retrieval
        if not isinstance(self.bank, MemoryBank) or retrieval is None:
            return
        found = self.bank.fetch([] if memory is None else memory.ids)
        held = dict(
            zip(found.ids.tolist(), zip(found.keys, found.values, found.spans, strict=True), strict=True)
        )
        rows = [] if memory is None else list(zip(memory.ids, memory.blocks, memory.spans, strict=False))
        same = {
            each: (block, span)
            for each, block, span in rows
            if each < 0 or (each in held and _are_equal((block.keys, block.values, span), held[each]))
        }
        kept = torch.tensor([each in same for each in retrieval.ids.tolist()], dtype=torch.bool, device="cpu")
        self.retrieval = Retrieval(retrieval.query, retrieval.ids[kept], retrieval.scores[kept])
        self.memory = None
        if same.keys() - {-1}:  # a null chunk is not read alone
            blocks, spans = zip(*same.values(), strict=True)
            self.memory = StreamMemory(blocks, torch.stack(spans), tuple(same))

    def _passage(self, start: int, end: int) -> Passage:
        first = self._recent.start
        return Passage(self._recent.token_ids[start - first : end - first], start)


def _are_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(ours, theirs, strict=True))
