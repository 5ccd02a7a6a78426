"""Trainer: streams documents through a decoder, and trains LoRA, maps and gates to read its memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memlong.bank.sessions.folders import absolute
from memlong.decoder import MemoryConfig, MemoryDecoder
from memlong.decoder.persistence.fingerprint import facts
from memlong.decoder.persistence.pretrained import SETTINGS
from memlong.decoder.persistence.strangers import declared_options
from memlong.decoder.stream.retrieval import RandomChunks
from memlong.errors import InvalidArgumentError, MemlongError, MissingDependencyError, StorageError
from memlong.plugins.registry import installed_registry
from memlong.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from memlong.training.config import TrainingConfig
from memlong.training.curve import Curve, Step
from memlong.training.documents import Episodes
from memlong.training.folder import (
    CURVE,
    PICTURE,
    check_folder,
    checkpoints,
    clear_unfinished,
    holds_decoder,
    lock,
    remove_checkpoints,
)
from memlong.training.loss import Batch, segment_loss
from memlong.training.parts import TrainableParts


class Trainer:
    """Trains a decoder on streamed documents.

    ``rows`` documents are read in parallel, each with its own bank, and start together. The loss of a segment is
    backpropagated through that segment and through the computation of the memory it reads; the window and the stored
    K-V are constants.

    Parameters
    ----------
    decoder
        A decoder on a plain model, not attached. Its model is frozen and gets a LoRA adapter.
    documents
        Token ids [tokens] of each document.
    config
        The training settings.
    folder
        Folder for the curve, checkpoints and the trained decoder; created if missing.
    base_model
        Name under which `load_model` finds the model, for `MemoryDecoder.from_pretrained`.
    tensorboard
        Folder for TensorBoard's event files, or None.

    Raises
    ------
    InvalidArgumentError
        If there is nothing to train, the decoder has no memory, episodes are too short to need one, or several
        processes are launched.
    InvalidTextError
        If no document is long enough.
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
    ) -> None:
        self.decoder = decoder
        self.config = config = TrainingConfig() if config is None else config
        self.folder = absolute(folder)
        self._base_model = base_model
        self._tensorboard = None if tensorboard is None else absolute(tensorboard)
        check_settings(decoder.config, config)
        if decoder.model.dtype == torch.float16:
            raise InvalidArgumentError(
                "decoder.model must be bfloat16 or float32 for training, got float16, in which small gradients vanish"
            )
        self._accelerator = _accelerator(decoder)
        self.episodes = Episodes(documents, config.document_tokens, _least(decoder.config), config.seed)
        self._fingerprint = decoder.fingerprint()  # before the adapter is added
        self._generator = torch.Generator().manual_seed(config.seed)
        # The warmup stage uses the plain window; created before the adapter, as the decoder was.
        self._plain = (
            MemoryDecoder(decoder.model, decoder.tokenizer, replace(decoder.config, backend=None))
            if config.warmup_stage_steps
            else None
        )
        self._parts = TrainableParts(decoder, config)
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
        return holds_decoder(self.folder, asdict(self.config), memory)

    def run(self, *, resume: bool = False, progress: Callable[[Step], None] | None = None) -> list[Step]:
        """Train, save the decoder into the folder, and return the steps.

        Parameters
        ----------
        resume
            Resume from the folder's latest checkpoint, with the same results as without the interruption. On CUDA,
            attention gradients are not deterministic, so any two runs differ in their last bits.
        progress
            Called after each step; when resuming, first for all earlier steps.

        Raises
        ------
        InvalidArgumentError
            If there is no checkpoint to resume from, or it is from a different model, settings or text; if there is
            one, but ``resume`` is not set; if the folder has a trained decoder or files that a run would overwrite; or
            if this trainer is done.
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
        with lock(self.folder):
            return self._run(resume, progress)

    def _run(self, resume: bool, progress: Callable[[Step], None] | None) -> list[Step]:
        order = {name: self._parts.parameters[name] for name in self._in_order()}
        state = (order, self._optimizer, self._generator, self._made_of())
        if (self.folder / SETTINGS).exists() and not checkpoints(self.folder):
            kind = "a complete run with these settings" if self.ended else "a run with other settings"
            raise InvalidArgumentError(
                f"The folder {str(self.folder)!r} has the trained decoder of {kind}: load it with "
                "MemoryDecoder.from_pretrained, or give another folder"
            )
        check_folder(self.folder, resume=resume)
        clear_unfinished(self.folder)
        at = load_checkpoint(self.folder, *state) if resume else Progress()
        self._has_begun = self._has_begun or resume
        self._sums.clear()
        self._optimizer.zero_grad(set_to_none=True)
        curve = Curve(self.folder / CURVE, at.step, self._tensorboard)
        if progress is not None:
            for step in curve.steps:
                progress(step)
        saved = at.step
        try:
            while at.step < self.config.steps:
                self._read_episodes(at, curve, progress)
                if at.step - saved >= self.config.checkpoint_every and at.step < self.config.steps:
                    curve.sync()
                    save_checkpoint(self.folder, at, *state)
                    saved = at.step
        finally:
            curve.close()
        self._parts.freeze()
        self._settled = True
        self.decoder.save_pretrained(self.folder, base_model=self._base_model, training=asdict(self.config))
        remove_checkpoints(self.folder)
        curve.plot(self.folder / PICTURE)
        return curve.steps

    def _read_episodes(self, at: Progress, curve: Curve, progress: Callable[[Step], None] | None) -> None:
        """Read one episode per row, until they end or the run does."""
        rows = [self.episodes[at.episodes + row] for row in range(self.config.rows)]
        size = self.decoder.config.segment_size
        batch = Batch.of(rows, self.decoder.config.local_window, self.decoder.model.device)
        count = -(-batch.input_ids.shape[1] // size)
        warming_up = self._plain is not None and at.step < self.config.warmup_stage_steps
        decoder = self._plain if warming_up and self._plain is not None else self.decoder
        self._parts.learn(lower_layers=warming_up)
        decoder.reset(random_chunks=RandomChunks(self.config.random_share, self._generator))
        started = time.perf_counter()
        with decoder:
            for number, segment in enumerate(decoder.stream(batch.input_ids, batch.mask, gradients=True)):
                beginning = number - number % self.config.accumulate
                start = number * size
                if (
                    start + 1 < batch.input_ids.shape[1]
                ):  # otherwise only last tokens, which have no next token
                    loss = segment_loss(segment, batch, self.config.long_range_weight)
                    self._sums.append(loss.sums)
                    if (
                        loss.mean.requires_grad
                    ):  # not before the first retrieval, if only maps and gates are trained
                        self._accelerator.backward(loss.mean / min(self.config.accumulate, count - beginning))
                at.tokens += batch.tokens_between(start, start + size)
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
        at.episodes += self.config.rows
        at.seconds += time.perf_counter() - started

    def _update(self, at: Progress) -> list[float]:
        """Make an optimizer step, and return the sums of its losses: the one synchronization per step."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.config.share_of_rate(at.step)
        norm = self._accelerator.clip_grad_norm_(self._parts.parameters.values(), self.config.max_grad_norm)
        total = torch.stack(self._sums).sum(dim=0)
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
        total, count, distant, distant_count = sums
        return Step(
            at.step,
            total / count,
            distant / distant_count if distant_count else None,
            self.config.lr * self.config.share_of_rate(at.step - 1),
            at.tokens,
            at.seconds,
        )

    def _in_order(self) -> list[str]:
        """Return the names of the trainable parameters, in the optimizer's order."""
        names = {id(parameter): name for name, parameter in self._parts.parameters.items()}
        return [
            names[id(parameter)] for group in self._optimizer.param_groups for parameter in group["params"]
        ]

    def _made_of(self) -> dict[str, Any]:
        settings = asdict(self.config)
        del settings["checkpoint_every"]
        memory = self.decoder.config.as_dict()
        return {
            **settings,
            **{
                f"memory.{name}": value
                for name, value in memory.items()
                if name not in ("store", "maps", "gates")
            },
            **{f"model.{name}": value for name, value in facts(self._fingerprint)},  # includes maps and gates
            "text": self.episodes.digest,
        }


def check_settings(memory: MemoryConfig, training: TrainingConfig) -> None:
    """Reject settings with which no memory would be read.

    Raises
    ------
    InvalidArgumentError
        If there is no backend, or episodes are too short to read from memory.
    """
    if memory.backend is None:
        raise InvalidArgumentError(
            "backend must be a name for training, got None: there would be no memory to read"
        )
    if memory.retrieve_for != "all":
        raise InvalidArgumentError(
            "retrieve_for must be 'all' for training, got 'answers': no text would read from memory"
        )
    if training.document_tokens < _least(memory):
        raise InvalidArgumentError(
            f"document_tokens must be at least {_least(memory)}, with local_window {memory.local_window} and "
            f"segment_size {memory.segment_size}, got {training.document_tokens}: set it to several times that, or "
            "lower local_window"
        )


def _least(memory: MemoryConfig) -> int:
    """Return the length of the shortest episode that reads from memory, in tokens."""
    return memory.local_window + memory.segment_size


def _accelerator(decoder: MemoryDecoder) -> Any:
    if find_spec("accelerate") is None:
        raise MissingDependencyError("Training needs the package accelerate: pip install 'memlong[train]'")
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=decoder.model.device.type == "cpu", mixed_precision="no")
    if accelerator.num_processes > 1:
        raise InvalidArgumentError(
            f"Training must run in one process, got {accelerator.num_processes}: start it without `accelerate launch`, "
            "and set rows to what fits on the device"
        )
    return accelerator
