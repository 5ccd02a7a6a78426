"""Compare two runs of examples/recall_vs_perplexity.py, for example in two dtypes.

A ratio agrees if it lies within the other run's 95 % confidence interval.

    python examples/recall_vs_perplexity.py --dtype float32 --out out/float32
    python examples/recall_vs_perplexity.py --dtype bfloat16 --out out/bfloat16
    python bench/agreement.py out/float32 out/bfloat16
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from memlong.errors import InvalidArgumentError, MemlongError

FILE = "recall_vs_perplexity.json"
TOKENS = {"overall": "all scored tokens", "long_range": "long-range tokens"}
RATIOS = ("to_window", "to_equal_budget", "to_random")
ALIKE = ("model", "text", "tokens", "scored_tokens", "retriever", "chunk_size", "top_k", "local_window")


@dataclass(frozen=True)
class Pair:
    """The results of two runs for one system, on all or on long-range tokens."""

    system: str
    tokens: str
    first: dict[str, Any]
    second: dict[str, Any]

    @property
    def change(self) -> float:
        """Relative difference of the second perplexity from the first."""
        return float(self.second["perplexity"] / self.first["perplexity"] - 1)

    @property
    def agrees(self) -> bool:
        """Whether each ratio is within the other run's interval."""
        both = [(self.first[name], self.second[name]) for name in RATIOS]
        return all(_holds(one, other["value"]) and _holds(other, one["value"]) for one, other in both)


def main(
    first: Annotated[Path, typer.Argument(help=f"Folder with {FILE}.")],
    second: Annotated[Path, typer.Argument(help="Folder of the other run.")],
) -> None:
    """Compare two runs."""
    one, other = _read(first), _read(second)
    odd = [name for name in ALIKE if one.get(name) != other.get(name)]
    if odd:
        raise InvalidArgumentError(
            f"The two runs differ in {', '.join(odd)}, so they cannot be compared: run both with the same options"
        )
    pairs = list(_pairs(one, other))
    for tokens, said in TOKENS.items():
        mine = [pair for pair in pairs if pair.tokens == tokens]
        if mine:
            typer.echo(f"\n{said}\n")
            _print(mine, one["dtype"], other["dtype"])
    largest = max(pairs, key=lambda pair: abs(pair.change))
    agreeing = sum(pair.agrees for pair in pairs)
    typer.echo(
        f"\nPerplexities differ by {abs(largest.change):.2%} at most ({largest.system}, {TOKENS[largest.tokens]}). "
        f"In {agreeing} of {len(pairs)} lines, all ratios are within the other run's 95 % intervals."
    )


def _read(folder: Path) -> dict[str, Any]:
    path = folder / FILE if folder.is_dir() else folder
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"dtype": "?", **found, "systems": {each["name"]: each for each in found["systems"]}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(
            f"{str(path)!r} is not a result of examples/recall_vs_perplexity.py: {error!r}. Name its --out folder"
        ) from error


def _pairs(one: dict[str, Any], other: dict[str, Any]) -> Iterator[Pair]:
    for name, system in one["systems"].items():
        for tokens in TOKENS:
            both = [system.get(tokens), other["systems"].get(name, {}).get(tokens)]
            if all(both):
                yield Pair(name, tokens, *both)


def _holds(ratio: dict[str, float], value: float) -> bool:
    return bool(ratio["low"] <= value <= ratio["high"])


def _print(pairs: list[Pair], first: str, second: str) -> None:
    table = Table(box=box.MARKDOWN)
    table.add_column("system", no_wrap=True)
    for column in (first, second, "change", f"to window, {first}", f"to window, {second}", "agree"):
        table.add_column(column, justify="right", no_wrap=True)
    for pair in pairs:
        table.add_row(
            pair.system,
            f"{pair.first['perplexity']:.3f}",
            f"{pair.second['perplexity']:.3f}",
            f"{pair.change:+.2%}",
            *(
                "{value:.3f} [{low:.3f}, {high:.3f}]".format(**each["to_window"])
                for each in (pair.first, pair.second)
            ),
            "yes" if pair.agrees else "no",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"agreement: {error}") from error
