"""What a benchmark's result is: ratios to a baseline of the same run, each with its target, and a last line.

A result file holds where it was measured beside what was.

    python bench/ratios.py out/gpu/*.json     a table of them all
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from memlong.evaluation.environment import versions


@dataclass(frozen=True)
class Ratio:
    """What was measured over its baseline; ``target`` is the most (or ``at_least``: the least) that it should be."""

    name: str
    value: float
    target: float | None = None
    at_least: bool = False

    @property
    def is_beyond(self) -> bool:
        """Whether the target is missed."""
        if self.target is None:
            return False
        return self.value < self.target if self.at_least else self.value > self.target

    def __str__(self) -> str:
        side = "at least" if self.at_least else "at most"
        target = "" if self.target is None else f" (target: {side} {self.target:g})"
        return f"{self.name}: {self.value:.3f}{target}"


def last_line(ratios: Sequence[Ratio]) -> str:
    """How many ratios there are, and which miss their targets."""
    beyond = ", ".join(ratio.name for ratio in ratios if ratio.is_beyond)
    return f"{len(ratios)} ratios measured; beyond their target: {beyond or 'none'}"


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, threads and device of this process, and the versions of what it uses."""
    found: dict[str, Any] = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "versions": versions(),
    }
    return found


def write(path: Path | None, facts: Mapping[str, Any], ratios: Sequence[Ratio], device: str = "cpu") -> None:
    """Write a result file, if there is to be one."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {**facts, "machine": machine(device), "ratios": [asdict(ratio) for ratio in ratios]}
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def table(files: Sequence[Path]) -> str:
    """The ratios of several result files, a line each, and the last line over all of them."""
    ratios: list[Ratio] = []
    lines: list[str] = []
    for file in files:
        mine = [Ratio(**each) for each in json.loads(file.read_text(encoding="utf-8")).get("ratios", [])]
        lines += [f"{file.stem:14s} {ratio}" for ratio in mine]
        ratios += mine
    return "\n".join([*lines, last_line(ratios)])


if __name__ == "__main__":
    print(table([Path(name) for name in sys.argv[1:]]))
