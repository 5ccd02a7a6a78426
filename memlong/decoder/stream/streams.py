"""The state of a batch of streams: rows, their common window and what they have retrieved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlong.bank import MemoryBank
from memlong.bank.store.copying import to_device
from memlong.decoder.arrays import Bools, Ints
from memlong.decoder.config import MemoryConfig
from memlong.decoder.kv.buffers import layer_groups, turned
from memlong.decoder.kv.overlap import SideStream
from memlong.decoder.kv.sources import KvSource
from memlong.decoder.kv.window import LocalWindow
from memlong.decoder.model.attention import AttentionSlot
from memlong.decoder.model.calls import ModelCalls, Standing
from memlong.decoder.model.forward import Memory
from memlong.decoder.model.gates import MemoryGates
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.model.rope import AngleCache
from memlong.decoder.persistence.fingerprint import origin_of
from memlong.decoder.retrievers.base import Passage, Retriever
from memlong.decoder.stream.banks import check_origins
from memlong.decoder.stream.placement import positions_of
from memlong.decoder.stream.recall import RandomChunks, Retrieval
from memlong.decoder.stream.row import Row

_LONGEST = 1 << 17  # tokens of a model that does not say how many it can read


@dataclass(frozen=True)
class Segment:
    """What one forward call gave. Rows that have fewer tokens are padded on the left.

    Attributes
    ----------
    input_ids
        [rows, tokens], int64; 0 where padded.
    tokens
        [rows, tokens], int64: each token's index in its stream, −1 where padded.
    logits
        [rows, tokens, vocabulary], or [rows, 1, vocabulary] if only the last were asked for.
    retrievals
        What each row retrieved just before this call, or None.
    """

    input_ids: Tensor
    tokens: Tensor
    logits: Tensor
    retrievals: tuple[Retrieval | None, ...]


class Streams:
    """Streams that go through a model side by side; a row of the batch is a stream of its own.

    Parameters
    ----------
    model, layout
        The model, and what it is made of.
    config
        Sizes and modes.
    retriever
        Makes embeddings; None for the plain window.
    source
        Which layers attend to what is retrieved, and to which K-V.
    banks
        The bank of each row; None for the plain window.
    gates
        What each head adds to the logits of memory; None for nothing.
    random_chunks
        Now and then, what is retrieved instead of what was asked for; None for never.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: ModelLayout,
        config: MemoryConfig,
        retriever: Retriever | None,
        source: KvSource,
        banks: Sequence[MemoryBank | None],
        gates: MemoryGates | None = None,
        random_chunks: RandomChunks | None = None,
    ) -> None:
        self.rows = tuple(Row(config, bank, random_chunks) for bank in banks)
        self.use_banks(banks)
        self._model = model
        self._layout = layout
        self._config = config
        self._retriever = retriever
        self._source = source
        embeddings = cast("Tensor", model.get_input_embeddings().weight)
        self._device = embeddings.device
        self._groups = layer_groups(
            layout, source.retrieval_layers, source.stored_layers, config.local_window
        )
        # However long a window may become, room is made for what the model can read.
        capacity = min(config.sink_tokens + config.local_window, layout.max_positions or _LONGEST)
        self._window = LocalWindow(layout, self._groups, len(self.rows), capacity, embeddings.detach())
        self._calls = ModelCalls(model, layout, gates, self._device, embeddings.dtype)
        self._begun_with = self._window.states  # by row, when its present segment began
        self._placements = tuple(row.placement for row in self.rows)
        self._memory: Memory | None = None
        self._unread: list[Tensor] = []  # ids [rows, new] of tokens that no row has noted yet
        self._side = SideStream(self._device)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that attention works on: the windows and what is retrieved."""
        return self._window.nbytes + (self._memory.nbytes if self._memory else 0)

    def use_banks(self, banks: Sequence[MemoryBank | None]) -> None:
        """Go on with other banks, from the next retrieval."""
        self._origins = [bank and bank.origin for bank in banks]  # as they were when they were given
        for row, bank in zip(self.rows, banks, strict=True):
            row.bank, row.storing_from = bank, None
            if bank is not None:
                bank.is_read_into(self)

    def unstored(self, bank: MemoryBank) -> int:
        """How many tokens are in a row's window alone, and belong in this bank."""
        return sum(
            row.seen - row.first_token for row in self.rows if row.bank is bank and row.seen > row.first_token
        )

    def flush(self) -> list[list[int]]:
        """Let all whole chunks of the windows leave into the banks; return each row's tokens that make none."""
        self._catch_up()
        for index, row in enumerate(self.rows):
            leaving = row.departing(everything=True)
            if leaving:
                self._store(index, leaving)
                row.depart(len(leaving))
        return [row.tail() for row in self.rows]

    def fork(self, rows: Sequence[int]) -> Streams:
        """Return streams that go on from these rows, which may come more than once; these stay as they are.

        What the new rows store stays in drafts of the banks.
        """
        other = copy(self)
        other._go_on_from(rows)  # noqa: SLF001 - its own
        return other

    def _go_on_from(self, rows: Sequence[int]) -> None:
        if not self._is_in_place():
            self._move(gradients=False)
        if self._memory is not None and self._memory.keys:
            self._memory = self._memory.given_to(self._window)
        self.rows = tuple(self.rows[row].fork() for row in rows)
        self._window = self._window.of_rows(rows)
        self._begun_with = self._begun_with.of_rows(rows)
        self._placements = tuple(self._placements[row] for row in rows)
        self._memory = None if self._memory is None else self._memory.of_rows(rows)
        self._unread = [torch.cat([tokens[row : row + 1] for row in rows]) for tokens in self._unread]

    def rewind(self, most: int) -> list[list[int]]:
        """Take back each row's latest tokens, to be read again with memory that they ask for, and return them.

        They are ``most`` at most; of a model that carries states, all since the present segment began, which is where
        its states are known.
        """
        if not self._layout.states:
            return [row.rewind(most) for row in self.rows]
        self._window = self._window.with_states(self._begun_with)
        return [row.rewind(None) for row in self.rows]

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that the streams go on from, for `go_on`; the rest is each row's facts."""
        self._catch_up()
        found = self._window.tensors() | self._begun_with.saved("begun")
        for index, row in enumerate(self.rows):
            found |= {f"row.{index}.{name}": tensor for name, tensor in row.tensors().items()}
        return found

    def go_on(self, facts: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        """Stand where other streams stood; ValueError, KeyError or TypeError if none can have stood there."""
        blocks = self._source.block_layout(self._config.chunk_size, self._model.dtype, self._device)
        by_row: dict[str, dict[str, Tensor]] = {}
        for name, each in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "row":
                number, _, what = rest.partition(".")
                by_row.setdefault(number, {})[what] = each
        for index, (row, mine) in enumerate(zip(self.rows, facts, strict=True)):
            own = by_row.get(str(index), {})
            row.go_on(mine, own, blocks)
            if not all(0 <= token < self._layout.vocabulary for token in own["recent"].tolist()):
                raise ValueError(f"tokens of row {index} are not the model's")
        placements = tuple(row.placement for row in self.rows)
        memory = self._bring(gradients=False)
        window = self._window.of_tensors(
            tensors,
            lambda tokens, reach: positions_of(tokens, placements, sinks_apart=reach is None),
            memory.tokens if memory else 0,
        )
        begun_with = self._window.loaded_states("begun", tensors)
        latest = window.tokens.max(axis=1, initial=-1).tolist()
        if latest != [row.seen - 1 for row in self.rows]:
            raise ValueError("window and rows do not end at the same token")
        for reach, held in window.held.items():
            for row, tokens in zip(self.rows, held.tokens, strict=True):
                row.check_window(tokens, reach)
        self._memory = memory and memory.given_to(window)
        self._window, self._placements, self._begun_with = window, placements, begun_with

    def read(
        self,
        pending: Sequence[Sequence[int]],
        slot: AttentionSlot,
        logits_to_keep: int,
        *,
        gradients: bool = False,
    ) -> Iterator[Segment]:
        """Take each row's tokens through the model, segment by segment."""
        done = [0] * len(pending)
        while any(start < len(tokens) for start, tokens in zip(done, pending, strict=True)):
            upcoming = [
                tokens[start : start + row.segment_rest]
                for start, tokens, row in zip(done, pending, self.rows, strict=True)
            ]
            segment = self.advance(upcoming, slot, logits_to_keep, gradients=gradients)
            done = [start + len(new) for start, new in zip(done, upcoming, strict=True)]
            yield segment

    def segments_of(self, pending: Sequence[Sequence[int]]) -> int:
        """How many forward calls `read` makes of these tokens."""
        size = self._config.segment_size
        each = zip(self.rows, pending, strict=True)
        return max((-(-(row.seen % size + len(new)) // size) for row, new in each if new), default=0)

    def finish(self, pending: Sequence[Sequence[int]], slot: AttentionSlot) -> None:
        """Take each row's tokens through the model, for what they leave in the streams alone."""
        for _ in self.read(pending, slot, 1):
            pass

    @torch.no_grad()
    def advance(
        self,
        upcoming: Sequence[Sequence[int]],
        slot: AttentionSlot,
        logits_to_keep: int,
        *,
        retrieve: Callable[[Row], bool] = Row.begins_segment,
        gradients: bool = False,
    ) -> Segment:
        """Take each row's next tokens, none of them beyond its present segment, through the model.

        Rows for which ``retrieve`` holds first let go of old chunks and retrieve for the text at hand. With
        ``gradients``, this forward call records them; the window that it leaves behind, and what is stored of it, are
        constants.
        """
        with slot.reading:
            starting = [row for row, new in zip(self.rows, upcoming, strict=True) if new and retrieve(row)]
            self._turn_over(starting, gradients=gradients)
            indices = [
                range(row.seen, row.seen + len(new)) for row, new in zip(self.rows, upcoming, strict=True)
            ]
            input_ids, tokens = _left_padded(upcoming, 0), _left_padded(indices, -1)
            on_device = to_device(torch.from_numpy(input_ids), self._device)
            try:
                with torch.set_grad_enabled(gradients):
                    logits = self._forward(on_device, tokens, slot, logits_to_keep)
            finally:
                if gradients:
                    self._memory = self._memory and self._memory.detach()
            for row, new in zip(self.rows, upcoming, strict=True):
                row.take(new)
            retrievals = tuple(row.retrieval if row in starting else None for row in self.rows)
            return Segment(on_device, to_device(torch.from_numpy(tokens), self._device), logits, retrievals)

    @torch.no_grad()
    def step(self, input_ids: Tensor, slot: AttentionSlot, *, retrieve: Callable[[Row], bool]) -> Tensor:
        """Take one more token of each row [rows, 1] through the model; return its logits.

        Which tokens they are is not asked before the next retrieval, so that the host need not wait for it. Rows for
        which ``retrieve`` holds retrieve first.
        """
        with slot.reading:
            self._turn_over([row for row in self.rows if retrieve(row)], gradients=False)
            tokens = np.array([[row.seen] for row in self.rows])
            input_ids = to_device(input_ids, self._device)  # generate() leaves them where the prompt was
            logits = self._forward(input_ids, tokens, slot, 1)
            self._unread.append(input_ids)
            for row in self.rows:
                row.ahead += 1
            return logits

    def _catch_up(self) -> None:
        """Let each row note the tokens that it has taken in."""
        if self._unread:
            for row, token_ids in zip(self.rows, torch.cat(self._unread, dim=1).tolist(), strict=True):
                row.take(token_ids)
            self._unread = []

    def _forward(self, input_ids: Tensor, tokens: Ints, slot: AttentionSlot, logits_to_keep: int) -> Tensor:
        before = Standing(self._window, self._memory, self._placements)
        if not self._layout.states:
            logits, after = self._calls.run(before, input_ids, tokens, slot, logits_to_keep)
        else:
            self._note_beginnings(tokens)
            begun = [row.seen > 0 for row in self.rows]
            logits, after = self._calls.run_by_length(before, input_ids, tokens, begun, slot, logits_to_keep)
        self._window, self._memory = after.window, after.memory
        return logits

    def _note_beginnings(self, tokens: Ints) -> None:
        """Note the states of rows whose coming token begins a segment: from there tokens can be taken back."""
        coming: Bools = np.any(tokens >= 0, axis=1)
        rows = [number for number, row in enumerate(self.rows) if coming[number] and row.begins_segment()]
        if len(rows) == len(self.rows):
            self._begun_with = self._window.states
        elif rows:
            self._begun_with = self._begun_with.with_rows(rows, self._window.states.of_rows(rows))

    def _turn_over(self, starting: Sequence[Row], *, gradients: bool) -> None:
        """Between segments: old chunks leave into the banks, the text at hand retrieves, the window moves."""
        if starting:
            self._catch_up()
        for index, row in enumerate(self.rows):
            leaving = row.departing() if row in starting else []
            if leaving:
                self._store(index, leaving)
                row.depart(len(leaving))
        self._retrieve(starting)
        for row in starting:
            row.asked = None
        # What the window must be follows from the rows alone, so that a failure above is made good the next time.
        if starting or gradients or not self._is_in_place():
            self._move(gradients=gradients)

    def _store(self, index: int, leaving: Sequence[Passage]) -> None:
        row = self.rows[index]
        bank = row.bank
        if bank is None or self._retriever is None or row.has_stored(leaving):
            return
        keys, values = self._source.collect(self._window, index, leaving[0].start, leaving[-1].end)
        size = self._config.chunk_size
        spans = torch.tensor([(chunk.start, chunk.end) for chunk in leaving], device="cpu")
        embeddings = self._retriever.embed_chunks(leaving)
        own = bank if isinstance(bank, MemoryBank) else None  # a draft is dropped with all that is in it
        begins = own is not None and not len(own)
        if own is not None and not begins and own.origin != self._origins[index]:
            check_origins([own], self._origin())  # somebody else has stored there since
            self._origins[index] = own.origin
        row.storing_from = bank.next_id
        keys, values = _in_chunks(keys, size), _in_chunks(values, size)
        bank.add(embeddings, keys, values, spans, check_first=False)
        if own is not None and begins:
            own.origin = self._origins[index] = self._origin()

    def _origin(self) -> dict[str, Any]:
        return origin_of(self._model, self._config, self._layout, self._source, self._retriever)

    def _retrieve(self, starting: Sequence[Row]) -> None:
        # A bank that was given may hold something before the stream has any text to ask with.
        asking = [row for row in starting if row.query().token_ids and row.bank is not None and len(row.bank)]
        for row in starting:
            row.forget()
        if asking and self._retriever is not None:
            queries = self._retriever.embed_queries([row.query() for row in asking])
            with self._side.beside():
                for row, query in zip(asking, queries, strict=True):
                    row.recall(query)

    def _is_in_place(self) -> bool:
        """Whether the window holds what the rows keep, stands where they say, and has room for what they retrieved."""
        placements = tuple(row.placement for row in self.rows)
        room = self._memory.tokens if self._memory else 0
        return (
            placements == self._placements
            and room == self._window.memory
            and np.array_equal(self._wanted(None), self._window.valid)
        )

    def _wanted(self, reach: int | None) -> Bools:
        tokens = self._window.held[reach].tokens
        return np.stack([row.keeps(mine, reach) for row, mine in zip(self.rows, tokens, strict=True)])

    def _move(self, *, gradients: bool) -> None:
        """Bring what was retrieved, and drop and place the window's columns as the rows say."""
        placements = tuple(row.placement for row in self.rows)
        memory = self._bring(gradients=gradients)
        columns = memory.tokens if memory and not gradients else 0
        window = self._window
        wanted = {reach: self._wanted(reach) for reach in window.held}
        all_stay = all(each.all() for each in wanted.values())
        if columns != window.memory or columns or placements != self._placements or not all_stay:
            window = window.moved(
                wanted,
                lambda tokens, reach: positions_of(tokens, placements, sinks_apart=reach is None),
                columns,
            )
        if columns and memory and memory.arrival is None:  # else when the first layer wants it
            memory = memory.given_to(window)
        self._window, self._placements, self._memory = window, placements, memory

    def _bring(self, *, gradients: bool) -> Memory | None:
        if gradients:  # where the rest of the model is: gradients of one leaf are best made on one stream
            self._side.join()
            with torch.enable_grad():
                return self._assemble()
        if not self._side.is_there:
            return self._assemble(rotate=False)  # straight to where the window has room for them
        with self._side.beside():
            memory = self._assemble()
        if memory is None:
            return None
        return replace(memory, arrival=self._side.hand_over((*memory.keys, *memory.values)))

    def _assemble(self, *, rotate: bool = True) -> Memory | None:
        """Bring the rows' retrieved K-V into one batch, shorter ones padded; rotate keys to where they stand."""
        memories = [row.memory for row in self.rows]
        if not any(memories):
            return None
        each = [row.memory_positions() for row in self.rows]
        width = max(map(len, each))
        positions = np.stack([np.pad(mine, (0, width - len(mine))) for mine in each])
        valid = np.arange(width) < np.array([[len(mine)] for mine in each])
        angles = AngleCache(to_device(torch.from_numpy(positions), self._device))
        keys, values = [], []
        groups = [group for group in self._groups if group.has_memory]
        for group in groups:
            supplied = [
                self._source.supply(group.layers, memory.keys, memory.values) if memory else (None, None)
                for memory in memories
            ]
            raw, mine = (_batch(states).to(self._device) for states in zip(*supplied, strict=True))
            keys.append(turned(raw, angles.of(group.rope), group.rope.rotated) if rotate else raw)
            values.append(mine)
        layers = tuple(group.layers for group in groups)
        return Memory(positions, valid, layers, tuple(keys), tuple(values), None if rotate else angles)


def _left_padded(rows: Sequence[Sequence[int]], padding: int) -> Ints:
    padded = np.full((len(rows), max(map(len, rows))), padding, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[len(target) - len(row) :] = row
    return padded


def _in_chunks(states: Tensor, size: int) -> Tensor:
    """[layers, kv_heads, tokens, head_dim] -> [chunks, layers, kv_heads, size, head_dim]."""
    layers, heads, tokens, width = states.shape
    return states.reshape(layers, heads, tokens // size, size, width).permute(2, 0, 1, 3, 4)


def _batch(states: Sequence[Tensor | None]) -> Tensor:
    """Stack [layers, kv_heads, tokens, head_dim] of the rows, those with fewer tokens (or None) padded with zeros."""
    given = [state for state in states if state is not None]
    if len(states) == 1:
        return given[0][None]
    layers, heads, _, width = given[0].shape
    batch = given[0].new_zeros(len(states), layers, heads, max(state.shape[2] for state in given), width)
    for row, state in enumerate(states):
        if state is not None:
            batch[row, :, :, : state.shape[2]] = state
    return batch
