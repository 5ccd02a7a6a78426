"""The streams of a batch: one for each row, over a common window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from memlong.bank import Draft, MemoryBank
from memlong.bank.store.copying import to_device
from memlong.decoder.arrays import Bools, Ints
from memlong.decoder.kv.buffers import layer_groups
from memlong.decoder.kv.window import LocalWindow
from memlong.decoder.model.attention import AttentionSlot
from memlong.decoder.model.calls import BatchState, ModelCalls
from memlong.decoder.model.notes import AttentionNotes
from memlong.decoder.pages.attention import why_not_compiled
from memlong.decoder.pages.choice import PageBudget
from memlong.decoder.pages.room import Room
from memlong.decoder.retrievers.base import Passage, Retriever
from memlong.decoder.retrievers.query_map import QueryMap
from memlong.decoder.setup import Setup
from memlong.decoder.stream.attention_record import Counted, HeldChunk
from memlong.decoder.stream.batch_memory import MemoryLoader
from memlong.decoder.stream.positions import Placement, positions_of
from memlong.decoder.stream.retrieval import Choice
from memlong.decoder.stream.segment import Segment
from memlong.decoder.stream.storing import store_chunks
from memlong.decoder.stream.token_stream import TokenStream
from memlong.decoder.stream.tokens import left_padded
from memlong.errors import InvalidArgumentError

_LONGEST = 1 << 17  # tokens of a model that does not say how many it can read


class StreamBatch:
    """Streams that go through a model side by side, one for each row of the batch.

    Parameters
    ----------
    setup
        The model, its memory settings, and the parts made for them.
    slot
        Where the model's attention looks for memory.
    banks
        The bank of each row; None for the plain window.
    choices
        What chooses chunks in place of the retriever, for each row; None for never.

    Attributes
    ----------
    streams
        One for each row.
    """

    def __init__(
        self,
        setup: Setup,
        slot: AttentionSlot,
        banks: Sequence[MemoryBank | None],
        choices: Sequence[Choice | None] | None = None,
    ) -> None:
        self.streams = tuple(
            TokenStream(setup.config, bank, each, setup.source.null_chunk)
            for bank, each in zip(banks, choices or [None] * len(banks), strict=True)
        )
        self.use_banks(banks)
        self._setup = setup
        self._slot = slot
        config, layout, source = setup.config, setup.model_layout, setup.source
        embeddings = cast("Tensor", setup.model.get_input_embeddings().weight)
        self._device = embeddings.device
        groups = layer_groups(
            layout, source.retrieval_layers, source.stored_layers, config.local_window, source.heads
        )
        # However large local_window is, buffers start with no more than the model can read.
        capacity = min(config.sink_tokens + config.local_window, layout.max_positions or _LONGEST)
        window = LocalWindow.empty(layout, groups, len(self.streams), capacity, embeddings.detach())
        self._state = BatchState(window, None, self._placements())
        self._segment_states = window.states  # of each row, at the beginning of its current segment
        budget = PageBudget.of(config.attended_tokens, config.chunk_size)
        self._calls = ModelCalls(
            setup.model, layout, setup.gates, slot, self._device, embeddings.dtype, budget
        )
        attending = [group for group in groups if group.has_memory]
        new_room = None
        if budget is not None and why_not_compiled(layout, source.retrieval_layers, embeddings) is None:
            new_room = partial(Room, source, attending, budget)
        self._loader = MemoryLoader(source, attending, self._device, new_room)
        self._unread: list[Tensor] = []  # ids [rows, new] of tokens that the streams have not noted yet

    @property
    def window(self) -> LocalWindow:
        """The windows of all rows."""
        return self._state.window

    @property
    def banks(self) -> tuple[MemoryBank, ...]:
        """The banks of the rows that store in one, and not in a draft of one."""
        return tuple(stream.bank for stream in self.streams if isinstance(stream.bank, MemoryBank))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that attention works on: the windows and what is retrieved."""
        memory = self._state.memory
        return self.window.nbytes + (memory.nbytes if memory else 0)

    def use_banks(self, banks: Sequence[MemoryBank | None]) -> None:
        """Continue with other banks, from the next retrieval on."""
        for stream, bank in zip(self.streams, banks, strict=True):
            stream.use_bank(bank)
            if bank is not None:
                bank.is_read_into(self)

    def unstored(self, bank: MemoryBank) -> int:
        """How many tokens are in a row's window alone, and belong in this bank."""
        return sum(
            stream.seen - stream.first_token
            for stream in self.streams
            if stream.bank is bank and stream.seen > stream.first_token
        )

    def flush(self) -> list[list[int]]:
        """Move all whole chunks of the windows into the banks; return each row's tokens that do not fill one."""
        self._catch_up()
        self._store({row: stream.departing(everything=True) for row, stream in enumerate(self.streams)})
        return [stream.tail() for stream in self.streams]

    def fork(self, rows: Sequence[int]) -> StreamBatch:
        """Return streams that continue from these rows, which may come more than once; these stay as they are.

        What the new streams store stays in drafts of the banks.
        """
        other = copy(self)
        other._become_forks(rows)  # noqa: SLF001 - the same class
        return other

    def _become_forks(self, rows: Sequence[int]) -> None:
        if not self._is_in_place():
            self._move(gradients=False)
        memory = self._state.memory
        if memory is not None and memory.keys:
            memory = memory.given_to(self.window)
        self._state = replace(self._state, memory=memory).of_rows(rows)
        self.streams = tuple(self.streams[row].fork() for row in rows)
        self._segment_states = self._segment_states.of_rows(rows)
        self._unread = [torch.cat([tokens[row : row + 1] for row in rows]) for tokens in self._unread]

    def rewind(self, most: Sequence[int]) -> list[list[int]]:
        """Take back and return each row's latest tokens, to be read again with memory that they ask for.

        At most ``most`` of each row; of a model that carries states, all since the current segment began, where its
        states are known.
        """
        if not self._setup.model_layout.states:
            return [stream.rewind(each) for stream, each in zip(self.streams, most, strict=True)]
        self._state = replace(self._state, window=self.window.with_states(self._segment_states))
        return [stream.rewind(None) for stream in self.streams]

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the streams, for `restore`; the rest is each stream's ``facts()``."""
        self._catch_up()
        found = self.window.tensors() | self._segment_states.saved("begun")
        for row, stream in enumerate(self.streams):
            found |= {f"row.{row}.{name}": tensor for name, tensor in stream.tensors().items()}
        return found

    def restore(
        self,
        facts: Sequence[Mapping[str, Any]],
        tensors: Mapping[str, Tensor],
        *,
        bases_changed: bool = False,
    ) -> None:
        """Continue from saved streams; ValueError, KeyError or TypeError if no stream can have been in that state.

        With ``bases_changed``, what they had retrieved is dropped where the banks do not hold it as it was.
        """
        blocks = self._setup.block_layout
        by_row: dict[str, dict[str, Tensor]] = {}
        for name in tensors:
            kind, _, rest = name.partition(".")
            if kind == "row":
                number, _, what = rest.partition(".")
                by_row.setdefault(number, {})[what] = tensors[name]
        for row, (stream, mine) in enumerate(zip(self.streams, facts, strict=True)):
            own = by_row.get(str(row), {})
            stream.restore(mine, own, blocks)
            if bases_changed:
                stream.drop_changed()
            known = [*own["recent"].tolist(), *(own["query"].tolist() if "query" in own else ())]
            if not all(0 <= token < self._setup.model_layout.vocabulary for token in known):
                raise ValueError(f"tokens of row {row} are not the model's")
        placements = self._placements()
        memory = self._loader.load(self.streams, None, gradients=False)
        window = self.window.of_tensors(
            tensors,
            lambda tokens, reach: positions_of(tokens, placements, sinks_apart=reach is None),
            memory.columns if memory else 0,
        )
        segment_states = window.loaded_states("begun", tensors)
        latest = window.tokens.max(axis=1, initial=-1).tolist()
        if latest != [stream.seen - 1 for stream in self.streams]:
            raise ValueError("window and rows do not end at the same token")
        for reach, held in window.columns.items():
            for stream, tokens in zip(self.streams, held.tokens, strict=True):
                stream.check_window(tokens, reach)
        if memory is not None and memory.keys:
            memory = memory.given_to(window)
        self._state = BatchState(window, memory, placements)
        self._segment_states = segment_states

    def ask_next(self, queries: Sequence[Sequence[int] | None] | None) -> None:
        """Retrieve next with these token ids, for each row; None for the text before.

        Raises
        ------
        InvalidArgumentError
            If they are not those of a query for each row.
        """
        if queries is None:
            return
        vocabulary = self._setup.model_layout.vocabulary
        given = [*queries] if isinstance(queries, Sequence) else []
        if len(given) != len(self.streams) or not all(_is_query(each, vocabulary) for each in given):
            raise InvalidArgumentError(
                f"queries must hold the token ids of a query, or None, for each of {len(self.streams)} rows, got "
                f"{queries!r:.80}"
            )
        if self._setup.retriever is None and any(query is not None for query in given):
            raise InvalidArgumentError(
                "queries must be None with backend None, as there is no memory to retrieve from: leave them out"
            )
        for stream, query in zip(self.streams, given, strict=True):
            if query is not None:
                stream.ask_with(query)

    def read(
        self,
        pending: Sequence[Sequence[int]],
        logits_to_keep: int,
        *,
        gradients: bool = False,
        counted: Counted | None = None,
    ) -> Iterator[Segment]:
        """Run the model over each row's tokens, segment by segment."""
        done = [0] * len(pending)
        while any(start < len(tokens) for start, tokens in zip(done, pending, strict=True)):
            upcoming = [
                tokens[start : start + stream.segment_rest]
                for start, tokens, stream in zip(done, pending, self.streams, strict=True)
            ]
            segment = self.advance(upcoming, logits_to_keep, gradients=gradients, counted=counted)
            done = [start + len(new) for start, new in zip(done, upcoming, strict=True)]
            yield segment

    def segments_of(self, pending: Sequence[Sequence[int]]) -> int:
        """How many forward calls `read` makes of these tokens."""
        size = self._setup.config.segment_size
        each = zip(self.streams, pending, strict=True)
        return max((-(-(stream.seen % size + len(new)) // size) for stream, new in each if new), default=0)

    def finish(self, pending: Sequence[Sequence[int]]) -> None:
        """Run the model over each row's tokens, only to have the streams read them."""
        for _ in self.read(pending, 1):
            pass

    @torch.no_grad()
    def advance(
        self,
        upcoming: Sequence[Sequence[int]],
        logits_to_keep: int,
        *,
        retrieve: Callable[[TokenStream], bool] = TokenStream.begins_segment,
        gradients: bool = False,
        counted: Counted | None = None,
    ) -> Segment:
        """Run the model over each row's next tokens, none of them beyond its current segment.

        Rows for which ``retrieve`` holds first store old chunks and retrieve for their latest text. With
        ``gradients``, this forward call records them; the window that it leaves, and what is stored of it, are
        constants. If attention is recorded, that of the tokens that are ``counted``; of none by default.
        """
        with self._slot.reading:
            each = list(zip(self.streams, upcoming, strict=True))
            starting = [stream for stream, new in each if new and retrieve(stream)]
            self._turn_over(starting, gradients=gradients)
            indices = [range(stream.seen, stream.seen + len(new)) for stream, new in each]
            input_ids, tokens = left_padded(upcoming, 0), left_padded(indices, -1)
            on_device = to_device(torch.from_numpy(input_ids), self._device)
            try:
                with torch.set_grad_enabled(gradients):
                    logits = self._forward(on_device, tokens, logits_to_keep, counted)
            finally:
                memory = self._state.memory
                if gradients and memory is not None:
                    self._state = replace(self._state, memory=memory.detach())
            for stream, new in each:
                stream.take(new)
            retrievals = tuple(stream.retrieval if stream in starting else None for stream in self.streams)
            return Segment(on_device, to_device(torch.from_numpy(tokens), self._device), logits, retrievals)

    @torch.no_grad()
    def step(
        self, input_ids: Tensor, *, retrieve: Callable[[TokenStream], bool], counted: Counted | None = None
    ) -> Tensor:
        """Run the model over one more token of each row [rows, 1]; return its logits.

        The token ids are not needed on the host before the next retrieval, so that it need not wait for them. Rows for
        which ``retrieve`` holds retrieve first. ``counted`` is as for `advance`.
        """
        with self._slot.reading:
            self._turn_over([stream for stream in self.streams if retrieve(stream)], gradients=False)
            tokens = np.array([[stream.seen] for stream in self.streams])
            input_ids = to_device(input_ids, self._device)  # generate() leaves them where the prompt was
            logits = self._forward(input_ids, tokens, 1, counted)
            self._unread.append(input_ids)
            for stream in self.streams:
                stream.ahead += 1
            return logits

    def _catch_up(self) -> None:
        """Let each stream note the tokens that it has read."""
        if self._unread:
            for stream, ids in zip(self.streams, torch.cat(self._unread, dim=1).tolist(), strict=True):
                stream.take(ids)
            self._unread = []

    def _forward(
        self, input_ids: Tensor, tokens: Ints, logits_to_keep: int, counted: Counted | None
    ) -> Tensor:
        record, notes = self._slot.record, None
        if record is not None and counted is not None:
            notes = AttentionNotes(counted.weights(tokens, self._device))
        if not self._setup.model_layout.states:
            logits, self._state = self._calls.run(self._state, input_ids, tokens, logits_to_keep, notes)
        else:
            self._note_segment_states(tokens)
            begun = [stream.seen > 0 for stream in self.streams]
            logits, self._state = self._calls.run_by_length(
                self._state, input_ids, tokens, begun, logits_to_keep, notes
            )
        if record is not None and counted is not None and notes is not None:
            record.add(notes, counted, self._held_chunks())
        return logits

    def _held_chunks(self) -> list[list[HeldChunk]]:
        """What each row attends to, chunk by chunk in the order of the columns."""
        memory = self._state.memory
        if memory is None:
            return []
        each = [stream.held_chunks() for stream in self.streams]
        return [[chunks[place] for place in memory.order(row)] for row, chunks in enumerate(each)]

    def _note_segment_states(self, tokens: Ints) -> None:
        """Note the states of rows whose next token begins a segment: tokens can be taken back to there."""
        coming: Bools = np.any(tokens >= 0, axis=1)
        rows = [row for row, stream in enumerate(self.streams) if coming[row] and stream.begins_segment()]
        states = self.window.states
        if len(rows) == len(self.streams):
            self._segment_states = states
        elif rows:
            self._segment_states = self._segment_states.with_rows(rows, states.of_rows(rows))

    def _turn_over(self, starting: Sequence[TokenStream], *, gradients: bool) -> None:
        """Between segments: old chunks move into the banks, the latest text retrieves, the window moves."""
        if starting:
            self._catch_up()
        self._store(
            {row: stream.departing() for row, stream in enumerate(self.streams) if stream in starting}
        )
        self._retrieve(starting)
        for stream in starting:
            stream.forget_query()
        # What the window must hold follows from the streams alone, so that the next call repairs a failure above.
        if starting or gradients or not self._is_in_place():
            self._move(gradients=gradients)

    def _store(self, departing: Mapping[int, Sequence[Passage]]) -> None:
        leaving = {row: chunks for row, chunks in departing.items() if chunks}
        store_chunks(self._setup, self.streams, leaving, self.window)

    def _retrieve(self, starting: Sequence[TokenStream]) -> None:
        # A bank that was passed in may hold something before the stream has any text to query with.
        asking = [
            stream
            for stream in starting
            if stream.query().token_ids and stream.bank is not None and stream.retrieves and len(stream.bank)
        ]
        for stream in starting:
            stream.forget()
        retriever = self._setup.retriever
        if asking and retriever is not None:
            queries = _queries(asking, retriever, self._setup.query_map)
            with self._loader.copy_stream.active():
                for stream, query in zip(asking, queries, strict=True):
                    stream.retrieve(query, retriever, self._others(stream))

    def _others(self, stream: TokenStream) -> list[MemoryBank | Draft]:
        """Return the banks of the other rows, from the next row on."""
        row = self.streams.index(stream)
        others = (*self.streams[row + 1 :], *self.streams[:row])
        return [each.bank for each in others if each.bank is not None]

    def _placements(self) -> tuple[Placement, ...]:
        return tuple(stream.placement for stream in self.streams)

    def _is_in_place(self) -> bool:
        """Whether the window holds what the streams keep, where they place it, with columns for what they retrieved."""
        memory = self._state.memory
        held = memory.made_of if memory else [None] * len(self.streams)
        return (
            self._placements() == self._state.placements
            and (memory.columns if memory else 0) == self.window.memory
            and all(mine is stream.memory for mine, stream in zip(held, self.streams, strict=True))
            and np.array_equal(self._wanted(None), self.window.valid)
        )

    def _wanted(self, reach: int | None) -> Bools:
        tokens = self.window.columns[reach].tokens
        return np.stack(
            [stream.keeps(mine, reach) for stream, mine in zip(self.streams, tokens, strict=True)]
        )

    def _move(self, *, gradients: bool) -> None:
        """Load what was retrieved, and drop and re-position the window's columns as the streams say."""
        placements = self._placements()
        memory = self._loader.load(self.streams, self._state.memory, gradients=gradients)
        columns = memory.columns if memory and not gradients else 0
        window = self.window
        wanted = {reach: self._wanted(reach) for reach in window.columns}
        all_stay = all(each.all() for each in wanted.values())
        is_placed = placements == self._state.placements
        if columns != window.memory or columns or not is_placed or not all_stay:
            window = window.moved(
                wanted,
                lambda tokens, reach: positions_of(tokens, placements, sinks_apart=reach is None),
                columns,
            )
        if columns and memory and memory.ready is None:  # otherwise when the first retrieval layer needs it
            memory = memory.given_to(window)
        self._state = BatchState(window, memory, placements)


def _queries(streams: Sequence[TokenStream], retriever: Retriever, query_map: QueryMap | None) -> Tensor:
    """Return the embeddings [streams, dim] of what the streams ask for."""
    passages = [stream.query() for stream in streams]
    asked = retriever.embed_queries if query_map is None else partial(query_map.embed_queries, retriever)
    banks = {
        row: stream.bank
        for row, stream in enumerate(streams)
        if stream.is_focused and stream.bank is not None
    }
    if not banks:
        return asked(passages)
    means = torch.stack([bank.mean_embedding() for bank in banks.values()])
    sizes = [len(bank) for bank in banks.values()]
    found = retriever.embed_focus([passages[row] for row in banks], means, sizes)
    # Where chunks have all in common with the query, it asks as it is.
    is_left = found.any(dim=1)
    rows = torch.tensor([*banks], device="cpu")[is_left]
    if len(rows) == len(streams):
        return found
    return asked([each.latest for each in passages]).to(found).index_copy(0, rows, found[is_left])


def _is_query(given: object, vocabulary: int) -> bool:
    if given is None:
        return True
    return (
        isinstance(given, Sequence)
        and bool(given)
        and all(type(token) is int and 0 <= token < vocabulary for token in given)
    )
