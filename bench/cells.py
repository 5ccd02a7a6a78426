"""Read result files, and format them as Markdown tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results"
Rows = Iterable[Iterable[str]]


def load(name: str) -> Any:
    """Return the content of a result file."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table(head: Iterable[str], rows: Rows, words: int = 1) -> str:
    """Return a Markdown table; the first ``words`` columns are text, the others numbers."""
    head = list(head)
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "".join("| " + " | ".join(row) + " |\n" for row in [head, rule, *map(list, rows)])


def perplexity(value: float) -> str:
    """Format with four significant digits."""
    return f"{value:#.4g}"


def interval(ratio: dict[str, float] | None, own: str = "1") -> str:
    """Format a ratio with its interval, or return ``own`` for a system compared with itself."""
    if ratio is None or ratio["low"] == ratio["high"] == 1:
        return own
    return f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
