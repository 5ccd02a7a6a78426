"""The picture of bench/front.py: gap closed against each cost, from its result."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
from front_tables import PARTS
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COSTS = {
    "reading": ("time of a segment, plain window = 1", 1.0),
    "generating": ("time of a generated token, plain window = 1", 1.0),
    "kv_read": ("K-V read for a token, MB", 1e6),
}


def draw(result: Mapping[str, Any], kind: str, path: Path) -> None:
    """Draw the gap closed on texts of a kind, all tokens above long-range ones; a line joins a family's systems."""
    mpl.use("Agg")
    figure, axes = plt.subplots(len(PARTS), len(COSTS), figsize=(15, 8), layout="constrained", squeeze=False)
    for row, (part, what) in zip(axes, PARTS.items(), strict=True):
        for axis, (cost, (label, _)) in zip(row, COSTS.items(), strict=True):
            _draw_families(axis, result, kind, part, cost)
            axis.set(title=f"{kind}, {what}", xlabel=label, ylabel="gap closed, %")
    named = next((axis for axis in axes.flat if axis.containers), None)
    if named is not None:
        handles, labels = named.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_families(axis: Axes, result: Mapping[str, Any], kind: str, part: str, cost: str) -> None:
    scale = COSTS[cost][1]
    points = sorted(
        (result["systems"][name]["family"], result["costs"][name][cost] / scale, name, parts[part])
        for name, parts in result["kinds"][kind]["systems"].items()
        if parts.get(part) and result["costs"].get(name, {}).get(cost) is not None
    )
    for family, members in groupby(points, key=lambda point: point[0]):
        _, across, names, gaps = zip(*members, strict=True)
        up = [100 * each["value"] for each in gaps]
        errors = [
            [max(0.0, value - 100 * each["low"]) for value, each in zip(up, gaps, strict=True)],
            [max(0.0, 100 * each["high"] - value) for value, each in zip(up, gaps, strict=True)],
        ]
        color = {"color": "gray"} if family == "window" else {}
        axis.errorbar(across, up, yerr=errors, marker="o", capsize=2, linewidth=1, label=family, **color)
        for place, name in zip(zip(across, up, strict=True), names, strict=True):
            size = name.removeprefix(family).strip()
            axis.annotate(size, place, textcoords="offset points", xytext=(4, 4), fontsize=7)
    axis.axhline(100, color="gray", linestyle=":", linewidth=1)
