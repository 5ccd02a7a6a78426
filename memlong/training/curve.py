"""The loss curve: one line of JSON per step, a plot at the end, and optionally TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

from memlong.bank.snapshot.files import oddity
from memlong.errors import InvalidArgumentError, MissingDependencyError, StorageError

_SMOOTHED_OVER = 20  # steps
_CURVES = (
    ("loss", "all tokens"),
    ("long_range_loss", "long-range tokens"),
    ("gain", "gain over foreign chunks"),
)


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes
    ----------
    step
        Its number, from 1.
    loss
        Mean negative log-likelihood of the step's tokens, in nats, unweighted.
    long_range_loss
        The same over long-range tokens; None if there were none.
    gain
        By how much the loss is lower than with foreign chunks; None if they were not tried.
    lr
        Learning rate of LoRA and maps.
    tokens, seconds
        Tokens read and wall time so far, interrupted runs included.
    """

    step: int
    loss: float
    long_range_loss: float | None
    gain: float | None
    lr: float
    tokens: int
    seconds: float


class Curve:
    """The steps of a run, appended to a file line by line.

    Parameters
    ----------
    path
        The file; steps beyond ``keep``, left by an interrupted run, are dropped.
    keep
        Number of steps that the run resumes from.
    tensorboard
        Folder for TensorBoard's event files, or None.
    writes
        Whether to write at all; otherwise, another process does, and steps are only kept.

    Raises
    ------
    InvalidArgumentError
        If the file lacks the steps that the run resumes from.
    MissingDependencyError
        If ``tensorboard`` is given, but not installed.
    StorageError
        If a file cannot be written, here or in the methods.
    """

    def __init__(
        self, path: Path, keep: int = 0, tensorboard: Path | None = None, *, writes: bool = True
    ) -> None:
        self.steps, size = _read(path, keep) if keep else ([], 0)
        self._writer = _tensorboard(tensorboard) if tensorboard is not None and writes else None
        self._path = path
        self._writes = writes
        if not writes:
            return
        with (
            _told(path),
            path.open("r+b" if keep else "wb") as file,
        ):  # truncated in place, never rewritten: the disk may be full
            file.truncate(size)
        self.sync()

    def add(self, step: Step) -> None:
        """Append a step to the file; it is durable after `sync`."""
        self.steps.append(step)
        if not self._writes:
            return
        with _told(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(_line(step))
        if self._writer is not None:
            self._writer.add_scalar("loss", step.loss, step.step)
            self._writer.add_scalar("lr", step.lr, step.step)
            for name in ("long_range_loss", "gain"):
                if getattr(step, name) is not None:
                    self._writer.add_scalar(name, getattr(step, name), step.step)

    def sync(self) -> None:
        """Flush all steps to disk: a checkpoint needs the steps before it."""
        if not self._writes:
            return
        with _told(self._path), self._path.open("ab") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        """Flush to disk and to TensorBoard."""
        self.sync()
        if self._writer is not None:
            self._writer.close()

    def plot(self, path: Path) -> bool:
        """Draw the curve if matplotlib is installed, and return whether it is."""
        if find_spec("matplotlib") is None:
            return False
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for name, label in _CURVES:
            points = [(step.step, getattr(step, name)) for step in self.steps]
            points = [(step, value) for step, value in points if value is not None]
            if points:
                steps, values = zip(*points, strict=True)
                (line,) = axes.plot(steps, _smooth(values), label=label)
                axes.plot(steps, values, alpha=0.25, linewidth=0.8, color=line.get_color())
        axes.set_xlabel("step")
        axes.set_ylabel("negative log-likelihood (nats)")
        axes.legend()
        try:
            with _told(path):
                figure.savefig(path, dpi=120)
        except StorageError:
            path.unlink(missing_ok=True)  # a partial plot
            raise
        return True


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"Cannot write {str(path)!r}: {error.strerror or error}. Checkpoints and a saved decoder are intact. Free "
            "some space or make the folder writable, then resume"
        ) from error


def _line(step: Step) -> str:
    return json.dumps(asdict(step)) + "\n"


def _read(path: Path, count: int) -> tuple[list[Step], int]:
    """Return the first steps and their size in bytes; the rest of the file may be truncated."""
    steps: list[Step] = []
    size = 0
    try:
        if odd := oddity(path):
            raise ValueError(f"it {odd}")
        for line in path.read_bytes().splitlines(keepends=True)[:count]:
            step = Step(**json.loads(line))
            if step.step != len(steps) + 1 or not _is_possible(step) or not line.endswith(b"\n"):
                raise ValueError(f"step {step.step!r} with the loss {step.loss!r}")
            steps.append(step)
            size += len(line)
        if len(steps) < count:
            raise ValueError("unexpected end of file")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InvalidArgumentError(
            f"{str(path)!r} must have the checkpoint's {count} steps, but line {len(steps) + 1} cannot be read: "
            f"{error}. Restore the file, or start over in another folder"
        ) from error
    return steps, size


def _is_possible(step: Step) -> bool:
    numbers = (
        step.loss,
        step.lr,
        step.seconds,
        *(each for each in (step.long_range_loss, step.gain) if each is not None),
    )
    return all(type(each) in (int, float) and isfinite(each) for each in numbers) and type(step.tokens) is int


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Return the moving average over the preceding steps."""
    starts = [max(0, end - _SMOOTHED_OVER) for end in range(1, len(values) + 1)]
    return [sum(values[start:end]) / (end - start) for end, start in enumerate(starts, start=1)]


def _tensorboard(folder: Path) -> Any:
    if find_spec("tensorboard") is None:
        raise MissingDependencyError(
            f"Writing TensorBoard logs to {str(folder)!r} needs the package tensorboard: pip install tensorboard. "
            "Without it, the curve is still written as JSON"
        )
    with _told(folder):
        return import_module("torch.utils.tensorboard").SummaryWriter(str(folder))
