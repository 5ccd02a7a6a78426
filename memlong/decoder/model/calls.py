"""Forward calls of a model over a window and a memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from memlong.bank.store.copying import to_device
from memlong.decoder.arrays import Ints
from memlong.decoder.kv.window import LocalWindow
from memlong.decoder.kv.window_cache import WindowCache
from memlong.decoder.model.adapters import check_acting
from memlong.decoder.model.attention import AttentionSlot, check_attached
from memlong.decoder.model.checkpointing import Again, Checkpointing
from memlong.decoder.model.forward import AttentionPass
from memlong.decoder.model.gates import MemoryGates
from memlong.decoder.model.kernels import steady_kernels
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.model.notes import AttentionNotes
from memlong.decoder.pages.choice import PageBudget
from memlong.decoder.stream.batch_memory import BatchMemory
from memlong.decoder.stream.positions import Placement, check_max_position, positions_of
from memlong.errors import MemlongError


def _copied(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # Not contiguous(), which takes a view of one row for what it is not.
    return tuple(each.clone(memory_format=torch.contiguous_format) for each in given)


@contextmanager
def _copied_for_head(model: PreTrainedModel) -> Iterator[None]:
    """Copy what the model's head is given, if its weights are frozen: the last token of each row, in a longer text.

    torch would copy frozen weights instead, once for each row, which in bfloat16 takes 25 to 90 times as long.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module) or any(each.requires_grad for each in head.parameters()):
        yield
        return
    hook = head.register_forward_pre_hook(_copied)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class BatchState:
    """What a forward call continues from, and what it leaves: the rows' window, memory and positions."""

    window: LocalWindow
    memory: BatchMemory | None
    placements: tuple[Placement, ...]

    def of_rows(self, rows: Sequence[int]) -> BatchState:
        """Return the state of these rows, which may come more than once."""
        memory = None if self.memory is None else self.memory.of_rows(rows)
        return BatchState(self.window.of_rows(rows), memory, tuple(self.placements[row] for row in rows))


@dataclass(frozen=True)
class ModelCalls:
    """Runs a model over new tokens.

    Parameters
    ----------
    model, model_layout
        The model and its layers.
    gates
        What each head adds to its logits of memory; None for nothing.
    slot
        Where the model's attention looks for memory.
    device, dtype
        Those of the model.
    budget
        How much of the memory a token attends to; None for all of it.
    """

    model: PreTrainedModel
    model_layout: ModelLayout
    gates: MemoryGates | None
    slot: AttentionSlot
    device: torch.device
    dtype: torch.dtype
    budget: PageBudget | None = None

    def run(
        self,
        before: BatchState,
        input_ids: Tensor,
        tokens: Ints,
        logits_to_keep: int,
        notes: AttentionNotes | None = None,
    ) -> tuple[Tensor, BatchState]:
        """Run the model over new ``tokens`` [rows, new], −1 where padded; return logits and the state after them.

        ``notes`` are taken of this call, not when its layers run again in a backward pass.
        """
        check_attached(self.model)
        check_acting(self.model, self.slot)
        self._check_unchanged()
        width = tokens.shape[1]
        # Until the window moves, sink tokens follow the memory with the rest of the text, at its distances.
        incoming = positions_of(tokens, before.placements, sinks_apart=False)
        check_max_position(int(incoming.max()), self.model_layout)
        window, memory = before.window.expecting(tokens, incoming), before.memory
        cache = WindowCache(window, self.model_layout)
        with ExitStack() as during:
            now = during.enter_context(self._through(cache, window, memory, width, notes))
            if self._checkpointing.is_on:
                again = self._again(before, tokens, incoming)
                during.enter_context(self._checkpointing.done_here(cache, again))
            if logits_to_keep and self.device.type == "cpu":
                during.enter_context(_copied_for_head(self.model))
            logits: Tensor = self.model(
                input_ids=input_ids,
                position_ids=to_device(torch.from_numpy(incoming), self.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            ).logits
        window = window.complete(width, cache.new_states())
        cache.release()
        return logits, BatchState(window, now.memory, before.placements)

    @contextmanager
    def _through(
        self,
        cache: WindowCache,
        window: LocalWindow,
        memory: BatchMemory | None,
        width: int,
        notes: AttentionNotes | None = None,
    ) -> Iterator[AttentionPass]:
        """Let this thread's attention use a memory, and a window that ``width`` columns are added to."""
        layout, gates = self.model_layout, self.gates
        now = AttentionPass(layout, window, width, memory, gates, self.device, self.budget, notes)
        self.slot.current, cache.add_memory = now, now.add_memory
        try:
            with steady_kernels(self.device):
                yield now
        finally:
            self.slot.current = cache.add_memory = None
            if memory is not None:
                memory.wait()  # if no retrieval layer was reached

    def _again(self, before: BatchState, tokens: Ints, incoming: Ints) -> Again:
        """Return what lets a layer run again in the backward pass, when the window has moved on."""
        kept = before.window.of_rows(range(len(tokens))) if torch.is_grad_enabled() else before.window

        @contextmanager
        def again() -> Iterator[WindowCache]:
            if not self.slot.modules:
                raise MemlongError(
                    "With gradient checkpointing, layers run again in the backward pass, which needs the memory: call "
                    "backward() inside `with decoder:`"
                )
            window = kept.expecting(tokens, incoming)
            cache = WindowCache(window, self.model_layout)
            with self._through(cache, window, before.memory, tokens.shape[1]):
                yield cache

        return again

    def _check_unchanged(self) -> None:
        now = cast("Tensor", self.model.get_input_embeddings().weight)
        if (now.device, now.dtype) != (self.device, self.dtype):
            raise MemlongError(
                f"The model must stay {self.dtype} on {self.device}, as it was when the stream began, got {now.dtype} "
                f"on {now.device}. Move it back, or call reset() and read the text again"
            )

    @cached_property
    def _checkpointing(self) -> Checkpointing:
        return Checkpointing(self.model)

    def run_by_length(
        self,
        before: BatchState,
        input_ids: Tensor,
        tokens: Ints,
        begun: Sequence[bool],
        logits_to_keep: int,
        notes: AttentionNotes | None = None,
    ) -> tuple[Tensor, BatchState]:
        """Do as `run`, grouping rows by their number of new tokens: padding would enter a recurrent state.

        ``begun`` says which rows have read something before.
        """
        lengths = [int(count) for count in (tokens >= 0).sum(axis=1)]
        kinds = list(zip(lengths, begun, strict=True))
        if len(set(kinds)) == 1:
            return self.run(before, input_ids, tokens, logits_to_keep, notes)
        if before.memory is not None and before.memory.keys and not torch.is_grad_enabled():
            before = BatchState(before.window, before.memory.given_to(before.window), before.placements)
        parts, groups, logits = [], [], None
        for count, has_begun in dict.fromkeys(kinds):
            rows = [row for row, kind in enumerate(kinds) if kind == (count, has_begun)]
            part = before.of_rows(rows)
            if count:
                new = slice(tokens.shape[1] - count, None)  # they are padded on the left
                mine = None if notes is None else notes.of_rows(rows, count)
                given, part = self.run(part, input_ids[rows, new], tokens[rows, new], logits_to_keep, mine)
                if notes is not None and mine is not None:
                    notes.join(rows, mine)
                if logits is None:
                    width = 1 if logits_to_keep else tokens.shape[1]
                    logits = given.new_zeros(len(kinds), width, given.shape[2])
                padded = functional.pad(given, (0, 0, logits.shape[1] - given.shape[1], 0))
                logits = logits.index_copy(
                    0, to_device(torch.tensor(rows, device="cpu"), given.device), padded
                )
            parts.append(part.window)
            groups.append(rows)
        assert logits is not None  # noqa: S101 - some row has a new token
        return logits, BatchState(before.window.joined(parts, groups), before.memory, before.placements)
