"""Trainer: streams documents through a decoder, and trains LoRA, maps, gates and a null chunk to read memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from memlong.bank.sessions.folders import absolute
from memlong.decoder import MemoryDecoder
from memlong.decoder.kv.null_chunk import check_top_k
from memlong.decoder.model.weights import module_digest
from memlong.decoder.persistence.fingerprint import facts
from memlong.decoder.persistence.pretrained import SETTINGS
from memlong.decoder.persistence.strangers import declared_options
from memlong.decoder.stream.retrieval import Choice
from memlong.errors import InvalidArgumentError, InvalidTextError, MemlongError, StorageError
from memlong.plugins.registry import installed_registry
from memlong.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from memlong.training.checks import check_settings, least_tokens
from memlong.training.chunks import ForeignChunks, Negatives, RandomChunks
from memlong.training.config import TEXT, TrainingConfig
from memlong.training.curve import Curve, Step
from memlong.training.documents import Episodes
from memlong.training.folder import (
    CURVE,
    PICTURE,
    UNSAID,
    check_folder,
    checkpoints,
    clear_unfinished,
    holds_decoder,
    lock,
    remove_checkpoints,
)
from memlong.training.found import found_answers
from memlong.training.loss import Batch, Piece, SegmentLoss, segment_loss, token_losses, tokens_between
from memlong.training.mixing import make_source
from memlong.training.parts import TrainableParts, checkpointed, first_chunk, keeping_chunks
from memlong.training.processes import Processes
from memlong.training.teacher import Lesson

if TYPE_CHECKING:
    from memlong.training.shards import Shards


class Trainer:
    """Trains a decoder on streamed documents.

    ``rows`` documents are read in parallel, each with its own bank, and start together. The loss of a segment is
    backpropagated through that segment and through the computation of the memory it reads; the window and the stored
    K-V are constants.

    With ``mix``, some episodes are generated, and ask for facts that have left the window; ``negatives`` and
    ``contrast`` take chunks of the other rows of this process.

    In several processes (``accelerate launch``), each creates its own trainer with the same arguments, and reads other
    documents. The losses are those of one process with all their rows, up to rounding, unless chunks of other rows are
    taken. The main process alone writes. With ``shard``, each holds a share of the frozen weights, and from then on the
    model runs in all processes at once or not at all: use the trained decoder by loading its folder.

    Parameters
    ----------
    decoder
        A decoder on a plain model, not attached. Its model is frozen and gets a LoRA adapter. With several processes,
        each has it on its own device; with ``shard``, it may be on the CPU, from where shares move to that device.
    documents
        Token ids [tokens] of each document.
    config
        The training settings.
    folder
        Folder for the curve, checkpoints and the trained decoder; created if missing. All processes must see it.
    base_model
        Name under which `load_model` finds the model, for `MemoryDecoder.from_pretrained`.
    tensorboard
        Folder for TensorBoard's event files, or None.
    lora
        Folder of a trained decoder whose LoRA to begin with, as ``MemoryConfig.maps`` names maps to begin with; None
        for one that changes nothing. Rank, alpha and layers must be those of the ``config``. The learning rate's
        schedule, gates and a null chunk start from scratch. To resume, the folder must still be there.

    Raises
    ------
    InvalidArgumentError
        If there is nothing to train, the decoder has no memory, episodes are too short to need one, or several
        processes are launched with FSDP, with more processes than GPUs, or with a decoder on another's device; or if
        the model cannot be divided among them.
    InvalidTextError
        If no document is long enough, or there are too few episodes for each row to have others beside it.
    MissingDependencyError
        If accelerate, peft or a requested tensorboard is not installed.
    StorageError
        If the folder cannot be created.
    """

    def __init__(
        self,
        decoder: MemoryDecoder,
        documents: list[Tensor],
        config: TrainingConfig | None = None,
        *,
        folder: str | Path,
        base_model: str | None = None,
        tensorboard: str | Path | None = None,
        lora: str | Path | None = None,
    ) -> None:
        self.decoder = decoder
        self.config = config = TrainingConfig() if config is None else config
        self.folder = absolute(folder)
        self._base_model = base_model
        self._tensorboard = None if tensorboard is None else absolute(tensorboard)
        check_settings(decoder.config, config)
        longest = decoder.model_layout.max_positions
        if config.distill and longest is not None and config.document_tokens > longest:
            raise InvalidArgumentError(
                f"document_tokens must be at most {longest} with distill, as full attention over an episode is the "
                f"teacher and the model was trained on no more, got {config.document_tokens}: lower it"
            )
        if decoder.model.dtype == torch.float16:
            raise InvalidArgumentError(
                "decoder.model must be bfloat16 or float32 for training, got float16, in which small gradients vanish"
            )
        device = decoder.model.device
        self._processes = Processes("auto" if config.shard and device.type == "cpu" else device)
        together = config.rows * self._processes.count
        reads_text = not config.mix or TEXT in config.mix or config.warmup_stage_steps > 0
        least = least_tokens(decoder.config) if reads_text else 1  # of filler, any length will do
        self.episodes = Episodes(documents, config.document_tokens, least, config.seed, together)
        if reads_text and (config.negatives or config.contrast) and len(self.episodes) < together:
            raise InvalidTextError(
                f"The documents must make at least {together} episodes, as many as are read in parallel, with "
                f"negatives or contrast, as a row's own text is not foreign to it, got {len(self.episodes)}: give "
                "more text, or lower document_tokens or rows"
            )
        self._source = make_source(decoder, config, self.episodes, documents)
        self._fingerprint = decoder.fingerprint()  # before the adapter is added
        makes_null_chunk = config.null_chunk and decoder.source.null_chunk is None
        if makes_null_chunk:
            check_top_k(decoder.config)
            decoder.source.null_chunk = first_chunk(
                decoder, self._source[0].tokens[: least_tokens(decoder.config)]
            )
        # The warmup stage uses the plain window; created before the adapter, as the decoder was.
        self._plain = (
            MemoryDecoder(decoder.model, decoder.tokenizer, replace(decoder.config, backend=None))
            if config.warmup_stage_steps
            else None
        )
        try:
            self._parts = TrainableParts(decoder, config, lora)
        except BaseException:
            if makes_null_chunk:
                decoder.source.null_chunk = None
            raise
        self._shards: Shards | None = None
        if config.shard and self._processes.count > 1:
            from memlong.training.shards import Shards  # not every build of torch has what it needs

            self._shards = Shards(decoder, self._parts.parameters.values(), self._processes)
        self._optimizer = torch.optim.AdamW(self._parts.groups(config))
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._sums: list[Tensor] = []
        self._settled = self._has_begun = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"Cannot create the folder {str(folder)!r}: {error.strerror}") from error

    @property
    def trainable_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self._parts.parameters.values())

    @property
    def ended(self) -> bool:
        """Whether the folder has the trained decoder of a complete run with these settings."""
        memory = self.decoder.config.as_dict() | declared_options(self.decoder.config, installed_registry())
        return holds_decoder(self.folder, self._recorded(), memory)

    def run(self, *, resume: bool = False, progress: Callable[[Step], None] | None = None) -> list[Step]:
        """Train, save the decoder into the folder, and return the steps.

        Parameters
        ----------
        resume
            Resume from the folder's latest checkpoint, with the same results as without the interruption. On CUDA,
            attention gradients are not deterministic, so any two runs differ in their last bits. The number of
            processes may differ if ``rows`` times that number is the same.
        progress
            Called after each step, in the main process; when resuming, first for all earlier steps.

        Raises
        ------
        InvalidArgumentError
            If there is no checkpoint to resume from, or it is from a different model, settings or text; if there is
            one, but ``resume`` is not set; if the folder has a trained decoder or files that a run would overwrite; if
            this trainer is done; or if processes differ in model, settings or text.
        StorageError
            If the folder cannot be written, or another run uses it. Checkpoints are kept.
        MemlongError
            If the loss or the gradient is not finite.
        """
        if self._settled:
            raise InvalidArgumentError(
                "This trainer is done, and its decoder is frozen: save it with save_pretrained(folder) if it is not "
                "saved yet, or create a new trainer on the plain model"
            )
        if self._has_begun and not resume:
            raise InvalidArgumentError(
                "This trainer's run was interrupted, and its weights are partly trained: resume from a checkpoint with "
                "resume=True, or create a new trainer on the plain model"
            )
        with lock(self.folder) if self._processes.is_main else nullcontext():
            return self._run(resume, progress if self._processes.is_main else None)

    def _run(self, resume: bool, progress: Callable[[Step], None] | None) -> list[Step]:
        writes = self._processes.is_main
        order = {name: self._parts.parameters[name] for name in self._in_order()}
        made_of = self._made_of()
        self._check_same({**made_of, "shard": self.config.shard})
        if self.config.null_chunk:
            # Each process has made its own, of which devices may differ in the last bits.
            for name, parameter in order.items():
                if name.startswith("null_chunk."):
                    parameter.data = self._processes.tensor_from_main(parameter)
        state = (order, self._optimizer, made_of)
        with self._processes.main_first():
            if writes:
                self._check_folder(resume)
                clear_unfinished(self.folder)
            at = load_checkpoint(self.folder, *state) if resume else Progress()
            self._has_begun = self._has_begun or resume
            curve = Curve(self.folder / CURVE, at.step, self._tensorboard, writes=writes)
        self._sums.clear()
        self._optimizer.zero_grad(set_to_none=True)
        if progress is not None:
            for step in curve.steps:
                progress(step)
        saved = at.step
        try:
            while at.step < self.config.steps:
                with self._processes.exchanging():
                    self._read_episodes(at, curve, progress)
                if at.step - saved >= self.config.checkpoint_every and at.step < self.config.steps:
                    if writes:
                        curve.sync()
                        save_checkpoint(self.folder, at, *state)
                    saved = at.step
        finally:
            curve.close()
        self._parts.freeze()
        self._settled = True
        if writes:
            self.decoder.save_pretrained(self.folder, base_model=self._base_model, training=self._recorded())
            remove_checkpoints(self.folder)
            curve.plot(self.folder / PICTURE)
        self._processes.wait()
        return curve.steps

    def _check_folder(self, resume: bool) -> None:
        if (self.folder / SETTINGS).exists() and not checkpoints(self.folder):
            kind = "a complete run with these settings" if self.ended else "a run with other settings"
            raise InvalidArgumentError(
                f"The folder {str(self.folder)!r} has the trained decoder of {kind}: load it with "
                "MemoryDecoder.from_pretrained, or give another folder"
            )
        check_folder(self.folder, resume=resume)

    def _check_same(self, made_of: dict[str, Any]) -> None:
        """Refuse to train something else than the main process does: a sum of such gradients means nothing."""
        ours = json.dumps(made_of, default=str)
        theirs = json.loads(self._processes.from_main(ours))
        for name, value in json.loads(ours).items():
            if value != theirs.get(name):
                raise InvalidArgumentError(
                    f"{name} must be {theirs.get(name)!r}, as in the main process, got {value!r} in process "
                    f"{self._processes.index}: train the same model on the same text in all processes, with the same "
                    "settings"
                )

    def _read_episodes(self, at: Progress, curve: Curve, progress: Callable[[Step], None] | None) -> None:
        """Read one episode per row, until they end in all processes or the run does."""
        first = at.episodes + self._processes.index * self.config.rows
        numbers = range(first, first + self.config.rows)
        size = self.decoder.config.segment_size
        warming_up = self._plain is not None and at.step < self.config.warmup_stage_steps
        source = self.episodes if warming_up else self._source  # nothing can be recalled without a memory
        batch = Batch.of(
            [source[number] for number in numbers],
            self.decoder.config.local_window,
            self.decoder.model.device,
        )
        lengths = self._processes.all_of(batch.lengths)
        count = -(-max(lengths) // size)
        own = [batch.counts(start, start + size) for start in range(0, count * size, size)]
        everywhere = self._processes.all_of([int(counts) for counts in own])
        learning = [any(everywhere[number::count]) for number in range(count)]
        decoder = self._plain if warming_up and self._plain is not None else self.decoder
        self._parts.learn(lower_layers=warming_up)
        started = time.perf_counter()
        lesson = None
        if self.config.distill and not warming_up:
            lesson = Lesson.of(decoder, batch.input_ids)
            if self._shards is not None:
                others = Lesson.calls(decoder, max(lengths)) - Lesson.calls(decoder, max(batch.lengths))
                self._shards.idle(others, gradients=False)
        choices = [self._choice(number, at.step) for number in numbers]
        decoder.reset(choice=choices)
        again = checkpointed(decoder.model) if self.config.gradient_checkpointing else nullcontext()
        with decoder, again, keeping_chunks(decoder.source, self.config.gradient_chunks):
            for number in range(count):
                beginning = number - number % self.config.accumulate
                start = number * size
                counts = own[number] if self._shards is None else learning[number]
                loss = self._read_segment(decoder, batch, start, lesson, choices, counts=counts)
                if learning[number]:
                    self._learn(loss, of=sum(learning[beginning : beginning + self.config.accumulate]))
                at.tokens += tokens_between(lengths, start, start + size)
                if number + 1 in (beginning + self.config.accumulate, count) and self._sums:
                    sums = self._update(at)
                    at.seconds += time.perf_counter() - started  # _update() has synchronized
                    started = time.perf_counter()
                    curve.add(self._step(at, sums))
                    if progress is not None:
                        progress(curve.steps[-1])
                    if at.step == self.config.steps:
                        break
        decoder.reset()
        at.episodes += len(lengths)
        at.seconds += time.perf_counter() - started

    def _read_segment(
        self,
        decoder: MemoryDecoder,
        batch: Batch,
        start: int,
        lesson: Lesson | None,
        choices: Sequence[Choice],
        *,
        counts: bool,
    ) -> SegmentLoss:
        """Read the segment of all rows that starts at a token, and return its loss if any token of it counts.

        If text does not retrieve, questions are answered as `MemoryDecoder.generate` does: in forks, which are dropped.
        The text itself, with its questions, is read like any other.
        """
        text = batch.piece(start, start + decoder.config.segment_size)
        if decoder.config.backend is None or decoder.config.retrieve_for == "all":
            return self._read_with_others(decoder, batch, text, lesson, counts=counts)
        loss = SegmentLoss.zero(decoder.model.device)
        if counts:
            asked = text.until_answered()
            loss = self._read_with_others(decoder, batch, asked, lesson, counts=True, in_forks=choices)
        self._read_with_others(decoder, batch, text.without_queries(), None, counts=False)
        return loss

    def _read_with_others(
        self,
        decoder: MemoryDecoder,
        batch: Batch,
        text: Piece,
        lesson: Lesson | None,
        *,
        counts: bool,
        in_forks: Sequence[Choice] | None = None,
    ) -> SegmentLoss:
        """Do as `_read`, and run a divided model in all processes alike."""
        shards = self._shards
        if shards is None:
            return self._read(decoder, batch, text, lesson, counts=counts, in_forks=in_forks)
        own = shards.calls_for(text.mask)
        tries = counts and self.config.contrast > 0 and own > 0 and _retrieves(decoder, text.start)
        calls, anyone_tries = self._processes.most_of([own, int(tries)])
        if anyone_tries:
            shards.idle(calls - own * tries, gradients=False)
        loss = self._read(decoder, batch, text, lesson, counts=counts, in_forks=in_forks)
        return replace(loss, total=loss.total + shards.idle(calls - own, gradients=counts))

    def _read(
        self,
        decoder: MemoryDecoder,
        batch: Batch,
        text: Piece,
        lesson: Lesson | None,
        *,
        counts: bool,
        in_forks: Sequence[Choice] | None = None,
    ) -> SegmentLoss:
        """Read a piece of all rows, in forks if it is given what chooses their chunks; return its loss if it counts."""
        if not text.mask.any():  # only other processes read on
            return SegmentLoss.zero(decoder.model.device)
        foreign = None
        if counts and self.config.contrast and _retrieves(decoder, text.start):
            tried = decoder.preview(text.input_ids, text.mask, queries=text.queries, choice=ForeignChunks())
            foreign = token_losses(tried, batch)
        if in_forks is None:
            (segment,) = decoder.stream(
                text.input_ids,
                text.mask,
                queries=text.queries,
                logits="all" if counts else "last",
                gradients=counts,
            )
        else:
            segment = decoder.preview(
                text.input_ids, text.mask, queries=text.queries, choice=in_forks, gradients=counts
            )
        if not counts:
            return SegmentLoss.zero(decoder.model.device)
        found = None
        if self.config.only_found and decoder.config.backend is not None:
            told = batch.places.gather(1, segment.tokens.cpu().clamp(min=0))
            found = found_answers(segment, told, decoder.banks)
        return segment_loss(segment, batch, self.config, foreign=foreign, lesson=lesson, found=found)

    def _learn(self, loss: SegmentLoss, of: int) -> None:
        """Backpropagate the loss of a segment, one of so many of an optimizer step in which any token counts."""
        mean = loss.share_of(self._processes.sum(loss.weight.float()))
        self._sums.append(loss.sums)
        if mean.requires_grad:  # not before the first retrieval, if only maps and gates are trained
            (mean / of).backward()

    def _update(self, at: Progress) -> list[float]:
        """Make an optimizer step, and return the sums of its losses: the one synchronization per step."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.config.share_of_rate(at.step)
        self._processes.sum_gradients(self._parts.parameters.values())
        norm = clip_grad_norm_(self._parts.parameters.values(), self.config.max_grad_norm)
        total = self._processes.sum(torch.stack(self._sums).sum(dim=0))
        self._sums.clear()
        *sums, length = torch.cat([total, norm.detach().reshape(1).to(total)]).tolist()
        if not (isfinite(sums[0]) and isfinite(length)):
            kept = checkpoints(self.folder)
            raise MemlongError(
                f"Training diverged in step {at.step + 1}: the sum of the losses is {sums[0]}, the gradient norm "
                f"{length}. The last checkpoint is {str(kept[-1]) if kept else None!r}. Start over in another folder, "
                "with a lower lr or gate_lr, or more warmup_steps"
            )
        self._optimizer.step()
        self._has_begun = True
        self._optimizer.zero_grad(set_to_none=True)
        at.step += 1
        return sums

    def _step(self, at: Progress, sums: list[float]) -> Step:
        total, count, distant, distant_count, foreign, own, tried = sums
        return Step(
            at.step,
            total / count,
            distant / distant_count if distant_count else None,
            (foreign - own) / tried if tried else None,
            self.config.lr * self.config.share_of_rate(at.step - 1),
            at.tokens,
            at.seconds,
        )

    def _choice(self, number: int, step: int) -> Choice:
        """Return what chooses the chunks of an episode, with the same random numbers in any process and row."""
        seed = int(np.random.default_rng((self.config.seed, number)).integers(2**63))
        generator = torch.Generator().manual_seed(seed)
        usual = RandomChunks(self.config.random_share, generator)
        others = self.config.negatives_at(step)
        return Negatives(usual, others, generator) if others else usual

    def _in_order(self) -> list[str]:
        """Return the names of the trainable parameters, in the optimizer's order."""
        names = {id(parameter): name for name, parameter in self._parts.parameters.items()}
        return [
            names[id(parameter)] for group in self._optimizer.param_groups for parameter in group["params"]
        ]

    def _recorded(self) -> dict[str, Any]:
        """Return the settings that the trained decoder's folder records."""
        count = self._processes.count
        lora = self._parts.begun_with
        return {
            **asdict(self.config),
            **({} if lora is None else {"lora": lora}),
            **({"processes": count} if count > 1 else {}),
        }

    def _made_of(self) -> dict[str, Any]:
        settings = asdict(self.config)
        del settings["checkpoint_every"], settings["shard"]
        settings["rows x processes"] = settings.pop("rows") * self._processes.count
        memory = self.decoder.config.as_dict()
        query_map = self.decoder.query_map
        return {
            **settings,
            "lora": self._parts.begun_with,
            **{
                f"memory.{name}": value
                for name, value in memory.items()
                if name not in ("store", "maps", "gates", "null_chunk", "query_map")
                and (name, value) != UNSAID
            },
            "query_map": None if query_map is None else module_digest(query_map),
            **{f"model.{name}": value for name, value in facts(self._fingerprint)},  # includes maps and gates
            "text": self.episodes.digest,
        }


def _retrieves(decoder: MemoryDecoder, start: int) -> bool:
    """Whether a chunk has left the window at this token, and is stored before its segment retrieves."""
    memory = decoder.config
    return memory.backend is not None and start > memory.sink_tokens + memory.window_past
