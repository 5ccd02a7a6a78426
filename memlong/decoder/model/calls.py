"""Forward calls of a model behind a window and a memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from memlong.bank.store.copying import to_device
from memlong.decoder.arrays import Ints
from memlong.decoder.kv.window import LocalWindow
from memlong.decoder.model.attention import AttentionSlot, check_attached
from memlong.decoder.model.checkpointing import Again, Checkpointing
from memlong.decoder.model.forward import AttentionPass, Memory
from memlong.decoder.model.gates import MemoryGates
from memlong.decoder.model.kernels import steady_kernels
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.stream.placement import Placement, check_reach, positions_of
from memlong.errors import MemlongError


@dataclass(frozen=True)
class Standing:
    """What a forward call goes on from, and what it leaves: the rows' window, their memory, and where both stand."""

    window: LocalWindow
    memory: Memory | None
    placements: Sequence[Placement]

    def of_rows(self, rows: Sequence[int]) -> Standing:
        """Those of these rows."""
        memory = None if self.memory is None else self.memory.of_rows(rows)
        return Standing(self.window.of_rows(rows), memory, [self.placements[row] for row in rows])


@dataclass(frozen=True)
class ModelCalls:
    """Runs a model over new tokens.

    Parameters
    ----------
    model, layout
        The model, and what it is made of.
    gates
        What each head adds to the logits of memory; None for nothing.
    device, dtype
        Where the model is, and in what it computes.
    """

    model: PreTrainedModel
    layout: ModelLayout
    gates: MemoryGates | None
    device: torch.device
    dtype: torch.dtype

    def run(
        self, before: Standing, input_ids: Tensor, tokens: Ints, slot: AttentionSlot, logits_to_keep: int
    ) -> tuple[Tensor, Standing]:
        """Take new tokens [rows, new], −1 where padded, through the model; return logits, and where it stands then."""
        check_attached(self.model)
        self._check_unchanged()
        width = tokens.shape[1]
        # Sinks stand behind the memory with the text, as far apart as in it, until the window moves.
        incoming = positions_of(tokens, before.placements, sinks_apart=False)
        check_reach(int(incoming.max()), self.layout)
        window, memory = before.window.expecting(tokens, incoming), before.memory
        with ExitStack() as during:
            now = during.enter_context(self._through(window, memory, slot, width))
            if self._checkpointing.is_on:
                again = self._again(before, tokens, incoming, slot)
                during.enter_context(self._checkpointing.done_here(window, again))
            logits: Tensor = self.model(
                input_ids=input_ids,
                position_ids=to_device(torch.from_numpy(incoming), self.device),
                past_key_values=window,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            ).logits
        window.complete(width)
        return logits, Standing(window, now.memory, before.placements)

    @contextmanager
    def _through(
        self, window: LocalWindow, memory: Memory | None, slot: AttentionSlot, width: int
    ) -> Iterator[AttentionPass]:
        """Let attention of this thread go through a window that takes in ``width`` columns, and a memory."""
        slot.current = now = AttentionPass(self.layout, window, width, memory, self.gates, self.device)
        window.supply = now.supply
        try:
            with steady_kernels(self.device):
                yield now
        finally:
            slot.current = window.supply = None
            if memory is not None:
                memory.wait()  # where no retrieval layer was reached

    def _again(self, before: Standing, tokens: Ints, incoming: Ints, slot: AttentionSlot) -> Again:
        """What lets a layer run again in the backward pass, when the window has long moved on."""
        kept = before.window.of_rows(range(len(tokens))) if torch.is_grad_enabled() else before.window

        @contextmanager
        def again() -> Iterator[LocalWindow]:
            if not slot.modules:
                raise MemlongError(
                    "With gradient checkpointing, layers run again in the backward pass, which needs the memory: call "
                    "backward() inside `with decoder:`."
                )
            window = kept.expecting(tokens, incoming)
            with self._through(window, before.memory, slot, tokens.shape[1]):
                yield window

        return again

    def _check_unchanged(self) -> None:
        now = cast("Tensor", self.model.get_input_embeddings().weight)
        if (now.device, now.dtype) != (self.device, self.dtype):
            raise MemlongError(
                f"The model is {now.dtype} on {now.device} now, but the stream began when it was {self.dtype} on "
                f"{self.device}: its window and its memory are. Move it back, or call reset() and read the text again."
            )

    @cached_property
    def _checkpointing(self) -> Checkpointing:
        return Checkpointing(self.model)

    def run_by_length(
        self,
        before: Standing,
        input_ids: Tensor,
        tokens: Ints,
        begun: Sequence[bool],
        slot: AttentionSlot,
        logits_to_keep: int,
    ) -> tuple[Tensor, Standing]:
        """Do as `run` does, rows with as many new tokens together: padding would enter a recurrent state.

        ``begun`` tells which rows have read something before.
        """
        lengths = [int(count) for count in (tokens >= 0).sum(axis=1)]
        kinds = list(zip(lengths, begun, strict=True))
        if len(set(kinds)) == 1:
            return self.run(before, input_ids, tokens, slot, logits_to_keep)
        if before.memory is not None and before.memory.keys and not torch.is_grad_enabled():
            before = Standing(before.window, before.memory.given_to(before.window), before.placements)
        parts, groups, logits = [], [], None
        for count, has_begun in dict.fromkeys(kinds):
            rows = [row for row, kind in enumerate(kinds) if kind == (count, has_begun)]
            part = before.of_rows(rows)
            if count:
                new = slice(tokens.shape[1] - count, None)  # they are padded on the left
                given, part = self.run(part, input_ids[rows, new], tokens[rows, new], slot, logits_to_keep)
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
        return logits, Standing(before.window.joined(parts, groups), before.memory, before.placements)
