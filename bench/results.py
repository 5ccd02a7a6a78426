"""Result files of benchmarks, with ratios, measurements and the machine; as a script, a table of several files.

python bench/results.py out/gpu/*.json
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ratios import Ratio, summary

from memlong.versions import versions


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return processor, cores, threads and device of this process, and library versions."""
    found: dict[str, Any] = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "versions": versions(),
    }
    return found


def write(path: Path | None, facts: Mapping[str, Any], ratios: Sequence[Ratio], device: str = "cpu") -> None:
    """Write a result file, if a path is given."""
    if path is not None:
        _put(path, {**facts, "machine": machine(device)}, ratios)


def _put(path: Path, facts: Mapping[str, Any], ratios: Sequence[Ratio]) -> None:
    """Write the file atomically: an interrupted write leaves the previous one intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {**facts, "ratios": [asdict(ratio) for ratio in ratios]}
    partial = path.with_name(f".{path.name}.writing")
    partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


class Budget:
    """A time limit in seconds, from now on; None means no limit."""

    def __init__(self, seconds: float | None = None) -> None:
        self._end = float("inf") if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left; negative once it is spent."""
        return self._end - time.monotonic()

    @property
    def is_spent(self) -> bool:
        """Whether there is no time left."""
        return self.left <= 0

    def share(self, parts: int) -> Budget:
        """Return an equal share of the time left, for one of several parts."""
        return Budget(None if self._end == float("inf") else self.left / parts)


class Report:
    """A result file that is rewritten after each measurement, so that an interrupted run keeps its results.

    Parameters
    ----------
    path : Path or None
        The file; None writes nothing.
    facts : mapping
        Facts known before measuring.
    device : str
        Device of the measurements.
    budget : Budget
        Time limit.
    """

    def __init__(
        self, path: Path | None, facts: Mapping[str, Any], device: str = "cpu", budget: Budget | None = None
    ) -> None:
        self.budget = budget or Budget()
        self.ratios: list[Ratio] = []
        self._path = path
        self._facts = {**facts, "complete": False, "left_out": []}
        self._machine = machine(device)
        self.write()

    def add(self, facts: Mapping[str, Any], ratios: Sequence[Ratio] = ()) -> None:
        """Record a measurement."""
        self._facts |= facts
        self.ratios += ratios
        self.write()

    def leave_out(self, what: str, why: str = "out of time") -> None:
        """Print and record what is skipped."""
        print(f"Skipped {what}: {why}")
        self._facts["left_out"].append(f"{what}: {why}")
        self.write()

    def end(self) -> None:
        """Mark the file as complete unless something was skipped, and print the summary."""
        self._facts["complete"] = not self._facts["left_out"]
        self.write()
        print(summary(self.ratios))

    def write(self) -> None:
        """Write the file, if a path is given."""
        if self._path is not None:
            _put(self._path, {**self._facts, "machine": self._machine}, self.ratios)


def table(files: Sequence[Path]) -> str:
    """Return the ratios of several result files, one per line, and a summary of all."""
    ratios: list[Ratio] = []
    lines: list[str] = []
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8")).get("ratios", [])
        mine = [Ratio(each["name"], each["value"], each["target"], each["at_least"]) for each in found]
        lines += [f"{file.stem:14s} {ratio}" for ratio in mine]
        ratios += mine
    return "\n".join([*lines, summary(ratios)])


if __name__ == "__main__":
    print(table([Path(name) for name in sys.argv[1:]]))
