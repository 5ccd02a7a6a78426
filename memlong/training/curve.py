"""The loss curve: one line of JSON a step, a picture at the end, and tensorboard where it is wanted."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memlong.errors import InvalidArgumentError, MissingDependencyError

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
    """

    def __init__(self, path: Path, keep: int = 0, tensorboard: Path | None = None) -> None:
        self.steps = _read(path, keep) if keep else []
        self._writer = None if tensorboard is None else _tensorboard(tensorboard)
        self._path = path
        path.write_text("".join(map(_line, self.steps)), encoding="utf-8")
        self.sync()

    def add(self, step: Step) -> None:
        """Note a step; it is in the file at once, and on the disk after :meth:`sync`."""
        self.steps.append(step)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(step))
        if self._writer is not None:
            self._writer.add_scalar("loss", step.loss, step.step)
            self._writer.add_scalar("lr", step.lr, step.step)
            if step.long_range_loss is not None:
                self._writer.add_scalar("long_range_loss", step.long_range_loss, step.step)

    def sync(self) -> None:
        """Wait until all steps are on the disk: a checkpoint goes with the steps before it."""
        with self._path.open("ab") as file:
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
        figure.savefig(path, dpi=120)
        return True


def _line(step: Step) -> str:
    return json.dumps(asdict(step)) + "\n"


def _read(path: Path, count: int) -> list[Step]:
    """The first steps; what follows them may be cut off."""
    steps: list[Step] = []
    try:
        lines = path.read_bytes().split(b"\n")[:count]
        for line in lines:
            step = Step(**json.loads(line))
            if step.step != len(steps) + 1 or not isinstance(step.loss, float):
                raise ValueError(f"step {step.step!r} with the loss {step.loss!r}")
            steps.append(step)
        if len(steps) < count:
            raise ValueError("it ends")
    except (OSError, ValueError, TypeError) as error:
        raise InvalidArgumentError(
            f"{str(path)!r} should hold the {count} steps that the checkpoint was made after, but cannot be read at "
            f"line {len(steps) + 1}: {error}. Put the file back, or begin anew in another folder."
        ) from error
    return steps


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
    return import_module("torch.utils.tensorboard").SummaryWriter(str(folder))
