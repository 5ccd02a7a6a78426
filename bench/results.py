"""Result files of benchmarks: ratios, what they were taken from, and where; and a table of several files.

python bench/results.py out/gpu/*.json
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ratios import Ratio, summary

from memlong.evaluation.environment import versions


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
        found = json.loads(file.read_text(encoding="utf-8")).get("ratios", [])
        mine = [Ratio(each["name"], each["value"], each["target"], each["at_least"]) for each in found]
        lines += [f"{file.stem:14s} {ratio}" for ratio in mine]
        ratios += mine
    return "\n".join([*lines, summary(ratios)])


if __name__ == "__main__":
    print(table([Path(name) for name in sys.argv[1:]]))
