"""The loss curve: one line of JSON a step, a picture at the end, and tensorboard where it is wanted."""

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


@dataclass(frozen=True)
class Step:
    """One step of the optimizer.

    Attributes
    ----------
    step
        Its number, from 1.
    loss
        Mean negative log-likelihood of the tokens of its segments, in nats, unweighted.
    long_range_loss
        The same over the long-range ones; None if there were none.
    lr
        Learning rate of LoRA and maps.
    tokens, seconds
        Read and spent until then, interrupted runs included.
    """

    step: int
    loss: float
    long_range_loss: float | None
    lr: float
    tokens: int
    seconds: float


class Curve:
    """The steps of a run, in a file that grows line by line.

    Parameters
    ----------
    path
        The file; what it holds beyond ``keep`` steps, of a run that was cut off, is dropped.
    keep
        Steps that a run goes on from.
    tensorboard
        Folder for tensorboard's event files, or None.

    Raises
    ------
    InvalidArgumentError
        If the file does not hold the steps that the run goes on from.
    MissingDependencyError
        If ``tensorboard`` is named and not installed.
    StorageError
        If a file cannot be written, here and in what follows.
    """

    def __init__(self, path: Path, keep: int = 0, tensorboard: Path | None = None) -> None:
        self.steps, size = _read(path, keep) if keep else ([], 0)
        self._writer = None if tensorboard is None else _tensorboard(tensorboard)
        self._path = path
        with (
            _told(path),
            path.open("r+b" if keep else "wb") as file,
        ):  # never emptied on the way: a disk may be full
            file.truncate(size)
        self.sync()

    def add(self, step: Step) -> None:
        """Note a step; it is in the file at once, and on the disk after `sync`."""
        self.steps.append(step)
        with _told(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(_line(step))
        if self._writer is not None:
            self._writer.add_scalar("loss", step.loss, step.step)
            self._writer.add_scalar("lr", step.lr, step.step)
            if step.long_range_loss is not None:
                self._writer.add_scalar("long_range_loss", step.long_range_loss, step.step)

    def sync(self) -> None:
        """Wait until all steps are on the disk: a checkpoint goes with the steps before it."""
        with _told(self._path), self._path.open("ab") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        """Let the disk and tensorboard have what there is."""
        self.sync()
        if self._writer is not None:
            self._writer.close()

    def plot(self, path: Path) -> bool:
        """Draw the curve, if matplotlib is installed; say whether it is."""
        if find_spec("matplotlib") is None:
            return False
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for name, label in (("loss", "all tokens"), ("long_range_loss", "long-range tokens")):
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
            path.unlink(missing_ok=True)  # half a picture
            raise
        return True


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{str(path)!r} cannot be written: {error.strerror or error}. Checkpoints, and a decoder that was saved, "
            "are as they were. Free some space, or make the folder writable, and resume."
        ) from error


def _line(step: Step) -> str:
    return json.dumps(asdict(step)) + "\n"


def _read(path: Path, count: int) -> tuple[list[Step], int]:
    """The first steps, and their bytes; what follows them may be cut off."""
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
            raise ValueError("it ends")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InvalidArgumentError(
            f"{str(path)!r} should hold the {count} steps that the checkpoint was made after, but cannot be read at "
            f"line {len(steps) + 1}: {error}. Put the file back, or start over in another folder."
        ) from error
    return steps, size


def _is_possible(step: Step) -> bool:
    numbers = (
        step.loss,
        step.lr,
        step.seconds,
        *([] if step.long_range_loss is None else [step.long_range_loss]),
    )
    return all(type(each) in (int, float) and isfinite(each) for each in numbers) and type(step.tokens) is int


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Mean over the steps before."""
    starts = [max(0, end - _SMOOTHED_OVER) for end in range(1, len(values) + 1)]
    return [sum(values[start:end]) / (end - start) for end, start in enumerate(starts, start=1)]


def _tensorboard(folder: Path) -> Any:
    if find_spec("tensorboard") is None:
        raise MissingDependencyError(
            f"Writing curves to {str(folder)!r} needs the package tensorboard: pip install tensorboard. The curve is "
            "written as JSON in any case."
        )
    with _told(folder):
        return import_module("torch.utils.tensorboard").SummaryWriter(str(folder))
