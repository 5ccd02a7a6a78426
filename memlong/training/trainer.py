"""Trainer: streams documents through a decoder, and lets LoRA, maps and gates learn to read its memory."""

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
from memlong.training.parts import LearningParts


class Trainer:
    """Trains a decoder on documents, as they are streamed.

    ``rows`` documents are read side by side, each with a bank of its own, and begin together. A segment's loss goes
    back through that segment, and through what made the memory that it read; the window and what is stored are
    constants.

    Parameters
    ----------
    decoder
        A decoder on a plain model, not attached. Its model is frozen and gets a LoRA adapter.
    documents
        Token ids [tokens] of each document.
    config
        How to train.
    folder
        Where curve, checkpoints and the trained decoder go; made if it does not exist.
    base_model
        Under which name `load_model` finds the model, for `MemoryDecoder.from_pretrained`.
    tensorboard
        Folder for tensorboard's event files, or None.

    Raises
    ------
    InvalidArgumentError
        If nothing would learn, the decoder has no memory, episodes are too short to need one, or several processes are
        launched.
    InvalidTextError
        If no document is long enough.
    MissingDependencyError
        If accelerate, peft or, where it is asked for, tensorboard is not installed.
    StorageError
        If the folder cannot be made.
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
                "The model is of float16, in which small gradients vanish: load it in bfloat16 or float32."
            )
        self._accelerator = _accelerator(decoder)
        self.episodes = Episodes(documents, config.document_tokens, _least(decoder.config), config.seed)
        self._fingerprint = decoder.fingerprint()  # of the model as it was given, without an adapter
        self._generator = torch.Generator().manual_seed(config.seed)
        # The warm-up stage reads over the plain window; made before the adapter, as the decoder itself was.
        self._plain = (
            MemoryDecoder(decoder.model, decoder.tokenizer, replace(decoder.config, backend=None))
            if config.warmup_stage_steps
            else None
        )
        self._parts = LearningParts(decoder, config)
        self._optimizer = torch.optim.AdamW(self._parts.groups(config))
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._sums: list[Tensor] = []
        self._settled = self._has_begun = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"The folder {str(folder)!r} cannot be made: {error.strerror}.") from error

    @property
    def learning(self) -> int:
        """How many numbers learn."""
        return sum(parameter.numel() for parameter in self._parts.parameters.values())

    @property
    def ended(self) -> bool:
        """Whether the folder holds the decoder that a run of these settings has trained."""
        memory = self.decoder.config.as_dict() | declared_options(self.decoder.config, installed_registry())
        return holds_decoder(self.folder, asdict(self.config), memory)

    def run(self, *, resume: bool = False, progress: Callable[[Step], None] | None = None) -> list[Step]:
        """Train, save the decoder into the folder, and return the steps.

        Parameters
        ----------
        resume
            Go on from the folder's latest checkpoint: all that follows is as if the run had not been interrupted. On
            CUDA, attention adds its gradients up in no fixed order: two runs differ in their last bits, resumed or not.
        progress
            Called after each step, and, when resuming, at once for those made before.

        Raises
        ------
        InvalidArgumentError
            If there is no checkpoint to resume from, or one of another model, other settings or other text; or there is
            one, and ``resume`` is not set; or the folder holds a trained decoder, or this trainer has made one; or it
            holds what a run would overwrite, and is not its own.
        StorageError
            If the folder cannot be written, or another run is at work in it. Checkpoints stay.
        MemlongError
            If the loss or the gradient is no longer finite.
        """
        if self._settled:
            raise InvalidArgumentError(
                "This trainer has run to its end, and its decoder is frozen: save that with save_pretrained(folder) "
                "if it is not saved yet, or make another trainer, on the plain model."
            )
        if self._has_begun and not resume:
            raise InvalidArgumentError(
                "This trainer's run was cut short, and its weights have learned: go on with resume=True from a "
                "checkpoint, or make another trainer, on the plain model."
            )
        with lock(self.folder):
            return self._run(resume, progress)

    def _run(self, resume: bool, progress: Callable[[Step], None] | None) -> list[Step]:
        order = {name: self._parts.parameters[name] for name in self._in_order()}
        state = (order, self._optimizer, self._generator, self._made_of())
        if (self.folder / SETTINGS).exists() and not checkpoints(self.folder):
            kind = "these settings, which has ended" if self.ended else "other settings"
            raise InvalidArgumentError(
                f"The folder {str(self.folder)!r} holds a decoder, of a run of {kind}. Load it with "
                "MemoryDecoder.from_pretrained, or name another folder."
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
        self._parts.settle()
        self._settled = True
        self.decoder.save_pretrained(self.folder, base_model=self._base_model, training=asdict(self.config))
        remove_checkpoints(self.folder)
        curve.plot(self.folder / PICTURE)
        return curve.steps

    def _read_episodes(self, at: Progress, curve: Curve, progress: Callable[[Step], None] | None) -> None:
        """Read one episode in each row, from its beginning to its end or that of the run."""
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
                ):  # else an episode's last token, which nothing follows
                    loss = segment_loss(segment, batch, self.config.long_range_weight)
                    self._sums.append(loss.sums)
                    if loss.mean.requires_grad:  # before the first memory, maps and gates have no part in it
                        self._accelerator.backward(loss.mean / min(self.config.accumulate, count - beginning))
                at.tokens += batch.tokens_between(start, start + size)
                if number + 1 in (beginning + self.config.accumulate, count) and self._sums:
                    sums = self._update(at)
                    at.seconds += time.perf_counter() - started  # the device has been waited for
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
        """Make a step, and return the sums of its losses; they are what the host waits for, once a step."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.config.share_of_rate(at.step)
        norm = self._accelerator.clip_grad_norm_(self._parts.parameters.values(), self.config.max_grad_norm)
        total = torch.stack(self._sums).sum(dim=0)
        self._sums.clear()
        *sums, length = torch.cat([total, norm.detach().reshape(1).to(total)]).tolist()
        if not (isfinite(sums[0]) and isfinite(length)):
            kept = checkpoints(self.folder)
            raise MemlongError(
                f"The run has diverged: in step {at.step + 1} the sum of the losses is {sums[0]} and the length of the "
                f"gradient {length}. The last checkpoint is {str(kept[-1]) if kept else None!r}. Start over in "
                "another folder, with a lower lr or gate_lr, or more warmup_steps."
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
        """Names of what learns, as the optimizer has it."""
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
            **{f"model.{name}": value for name, value in facts(self._fingerprint)},  # maps and gates, too
            "text": self.episodes.digest,
        }


def check_settings(memory: MemoryConfig, training: TrainingConfig) -> None:
    """Refuse settings with which there would be no memory to read.

    Raises
    ------
    InvalidArgumentError
        If there is no backend, or episodes end before anything leaves the window.
    """
    if memory.backend is None:
        raise InvalidArgumentError("The decoder has backend=None, so no memory to train on: name one.")
    if training.document_tokens < _least(memory):
        raise InvalidArgumentError(
            f"document_tokens is {training.document_tokens}, but with local_window {memory.local_window} and "
            f"segment_size {memory.segment_size} there is no memory to read before token {_least(memory)}. Set it to "
            "several times that, or local_window lower."
        )


def _least(memory: MemoryConfig) -> int:
    """Tokens of the shortest episode that comes to read a memory."""
    return memory.local_window + memory.segment_size


def _accelerator(decoder: MemoryDecoder) -> Any:
    if find_spec("accelerate") is None:
        raise MissingDependencyError("Training needs the package accelerate: pip install 'memlong[train]'")
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=decoder.model.device.type == "cpu", mixed_precision="no")
    if accelerator.num_processes > 1:
        raise InvalidArgumentError(
            f"{accelerator.num_processes} processes are launched, but training runs in one: start it without "
            "`accelerate launch`, and set rows to what the device holds."
        )
    return accelerator
