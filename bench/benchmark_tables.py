"""Tables and the picture of bench/benchmarks.py, from its result."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from cells import table
from matplotlib import pyplot as plt

_DRAWS = 1000
_ENOUGH = 3  # samples of each task, for an interval


@dataclass(frozen=True)
class Cell:
    """One system's scores on one task at one length, of all seeds [samples], each from 0 to 1."""

    task: str
    length: int
    scores: tuple[float, ...]


def by_length(rows: Mapping[str, Mapping[str, Any]], lengths: Sequence[int]) -> str:
    """Return a table of means over tasks, with 95 % intervals where there are enough samples for one."""
    return table(
        ["system", *(f"{length:,}" for length in lengths)],
        [[name, *(_shown(found.get(str(length))) for length in lengths)] for name, found in rows.items()],
    )


def by_task(cells: Mapping[str, Sequence[Cell]], tasks: Sequence[str], length: int) -> str:
    """Return a table of the tasks at one length."""
    rows = []
    for name, found in cells.items():
        mine = {cell.task: cell.scores for cell in found if cell.length == length}
        if not mine:
            continue
        rows.append([name, *(f"{100 * np.mean(mine[task]):.0f}" if task in mine else "" for task in tasks)])
    heads = [re.sub("^(ruler|babilong|hard_needle)_local_", "", task) for task in tasks]
    return table(["system", *heads], rows)


def draw(rows: Mapping[str, Mapping[str, Any]], lengths: Sequence[int], path: Path) -> None:
    """Draw the means over tasks by length, a line for each system."""
    mpl.use("Agg")
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, found in rows.items():
        there = [length for length in lengths if str(length) in found]
        means = [[100 * found[str(length)][key] for length in there] for key in ("value", "low", "high")]
        middle, low, high = (np.array(each) for each in means)
        errors = [np.maximum(middle - low, 0), np.maximum(high - middle, 0)]
        axis.errorbar(there, middle, yerr=errors, marker="o", capsize=3, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(lengths), [f"{length:,}" for length in lengths])
    axis.set(xlabel="tokens of a prompt", ylabel="score, mean over tasks, %", ylim=(0, 102))
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def means(cells: Sequence[Cell], lengths: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return the mean over tasks at each length, and its 95 % interval: samples of each task are resampled.

    One fewer is drawn than there are, as drawing all makes intervals of few samples too narrow.
    """
    found = {}
    for length in lengths:
        scores = [np.array(cell.scores) for cell in cells if cell.length == length]
        if not scores:
            continue
        rng = np.random.default_rng(0)
        draws = np.mean(
            [
                each[rng.integers(0, each.size, (_DRAWS, max(1, each.size - 1)))].mean(axis=1)
                for each in scores
            ],
            axis=0,
        )
        low, high = np.quantile(draws, [0.025, 0.975])
        middle = float(np.mean([each.mean() for each in scores]))
        count = min(each.size for each in scores)
        found[str(length)] = {"value": middle, "low": float(low), "high": float(high), "samples": count}
    return found


def _shown(cell: Mapping[str, float] | None) -> str:
    if cell is None:
        return ""
    value, low, high = (f"{100 * cell[key]:.0f}" for key in ("value", "low", "high"))
    return value if cell["samples"] < _ENOUGH else f"{value} [{low}, {high}]"
