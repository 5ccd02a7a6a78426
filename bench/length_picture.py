"""Draw the gap closed by length of the text, from several results of bench/front.py on the same texts.

The gap is that between a plain window and `lm 32`, which is near full attention where that is possible, and possible
where full attention is not.

    python bench/length_picture.py docs/results/front.json docs/results/front_far.json docs/results/front_farther.json
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer
from front_tables import PARTS
from matplotlib import pyplot as plt

from memlong.errors import InvalidArgumentError, MemlongError

_WINDOW, _CEILING = "window 1024", "lm 32"


def main(
    results: Annotated[list[Path], typer.Argument(help="Results of bench/front.py.")],
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("out/lengths.png"),
) -> None:
    """Draw it."""
    found = [_read(path) for path in results]
    texts = [name for name in found[-1]["texts"] if all(name in each["texts"] for each in found)]
    measured = [each["texts"][text]["systems"] for each in found for text in texts]
    common = [name for name in found[-1]["systems"] if all(name in each for each in measured)]
    systems = [name for name in common if name not in (_WINDOW, _CEILING)]
    if not texts or not systems or not {_WINDOW, _CEILING} <= {*common}:
        raise InvalidArgumentError(
            f"Results must share texts, and systems with {_WINDOW!r} and {_CEILING!r}: give those of one set of runs"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(found, texts, systems, out)
    typer.echo(f"Written: {out}")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"{str(path)!r} must be a result of bench/front.py: {error}") from error


def gaps(
    results: Sequence[Mapping[str, Any]], text: str, system: str, part: str
) -> tuple[list[int], list[float]]:
    """Return the lengths of a text in tokens, and the gap that a system closes at each, in percent."""
    lengths, closed = [], []
    for result in results:
        measured = result["texts"][text]["systems"]
        window, ceiling, mine = (
            math.log(measured[name][part]["perplexity"]) for name in (_WINDOW, _CEILING, system)
        )
        lengths.append(result["score_from"] + result["texts"][text]["tokens"])
        closed.append(100 * (window - mine) / (window - ceiling))
    return lengths, closed


def draw(
    results: Sequence[Mapping[str, Any]], texts: Sequence[str], systems: Sequence[str], path: Path
) -> None:
    """Draw a panel for each text, and for all and for long-range tokens; a line for each system."""
    mpl.use("Agg")
    figure, axes = plt.subplots(
        len(PARTS), len(texts), figsize=(5.5 * len(texts), 8), layout="constrained", squeeze=False
    )
    for row, (part, what) in zip(axes, PARTS.items(), strict=True):
        for axis, text in zip(row, texts, strict=True):
            for system in systems:
                lengths, closed = gaps(results, text, system, part)
                axis.plot(lengths, closed, marker="o", label=system)
            axis.axhline(100, color="gray", linestyle=":", linewidth=1)
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
            axis.set(title=f"{text}, {what}", xlabel="tokens", ylabel=f"gap closed, {_CEILING} = 100 %")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"length_picture: {error}") from error
