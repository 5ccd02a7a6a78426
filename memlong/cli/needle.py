"""``memlong needle``: pass-key retrieval at any depth and text length."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from memlong.cli import options
from memlong.cli.answer import say
from memlong.cli.choice import choose_decoder
from memlong.cli.files import keep_apart, writable
from memlong.cli.loading import machine_of
from memlong.cli.memory import MemoryOptions, described, with_memory
from memlong.cli.output import JsonOutput, print_table
from memlong.cli.values import numbers
from memlong.errors import InvalidArgumentError, MissingDependencyError

if TYPE_CHECKING:
    from memlong.evaluation.needle import Cell


@with_memory()
def needle(
    ctx: typer.Context,
    *,
    model: options.ModelUnlessAdapter = None,
    adapter: options.Adapter = None,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, comma-separated.")] = "2048,8192",
    depths: Annotated[
        str, typer.Option(help="Positions of the pass key, from 0 (start) to 1 (end), comma-separated.")
    ] = "0,0.25,0.5,0.75,1",
    trials: Annotated[int, typer.Option(min=1, help="Pass keys per length and depth.")] = 1,
    named: Annotated[
        bool,
        typer.Option(
            "--named", help="Hide the keys of all depths in one text, and ask for each by its name."
        ),
    ] = False,
    filler: Annotated[
        Path | None, typer.Option(help="UTF-8 text to fill prompts with  [default: a few repeated sentences]")
    ] = None,
    memory: MemoryOptions,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a heat map: PNG, SVG or PDF.")
    ] = None,
    json_file: options.JsonFile = None,
) -> None:
    """Hide a pass key at several depths of a long text, and ask for it.

    The defaults suit small models. Retrieved chunks are placed in order before the window, since small models mix up
    digits when all chunks share one position (--position-mode zero). Check first that the model finds the key without
    memory: --backend none, with a length that fits into --local-window.

    \b
    Examples:
      memlong needle --model demo --lengths 2048,8192,32768
      memlong needle --model demo --lengths 8192 --depths 0,0.5,1 --trials 4 --backend hnswlib
      memlong needle --model demo --lengths 2048 --backend none --local-window 2048 --json -
      memlong needle --model demo --lengths 8192 --named
      memlong needle --adapter trained --lengths 8192
      memlong needle --model demo --lengths 131072 --store disk=/tmp --store host=1GB --plot needle.png
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    keep_apart(
        {"--json": json_file, "--plot": plot},
        {"--filler": [filler], **memory.files, "--model": [model]},
    )
    output = JsonOutput(json_file)
    if plot is not None:
        _check_plot(plot)
    from memlong.evaluation import read_text
    from memlong.evaluation.needle import FILLER, evaluate_needle
    from memlong.evaluation.share import Share
    from memlong.versions import versions

    wanted = list(dict.fromkeys(numbers("--lengths", lengths, int)))
    places = list(dict.fromkeys(numbers("--depths", depths, float)))
    if not all(0 <= place <= 1 for place in places):
        raise InvalidArgumentError(f"--depths must be numbers from 0 to 1, got {depths!r}")
    if min(wanted) < 1:
        raise InvalidArgumentError(f"--lengths must be at least 1, got {lengths!r}")
    hay = FILLER if filler is None else read_text(filler)
    decoder = choose_decoder(
        ctx,
        model,
        adapter,
        memory,
        seed=seed,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    ).open()
    total = sum(wanted) * (1 if named else len(places)) * trials
    with (
        decoder,
        tqdm(total=total, unit="tok", desc=f"reading ({machine_of(decoder.model)})") as bar,
    ):
        cells = evaluate_needle(
            decoder,
            wanted,
            places,
            trials=trials,
            filler=hay,
            seed=seed,
            named=named,
            progress=bar.update,
        )
    found = sum(cell.accuracy for cell in cells) / len(cells)
    told = [each for cell in cells for each in cell.answers if each.source_named is not None]
    named_sources = {
        "answers": Share.of(bool(each.source_named) for each in told),
        "right_answers": Share.of(bool(each.source_named) for each in told if each.right),
    }
    result = {
        "model": model,
        "adapter": adapter,
        **described(decoder),
        "named": named,
        "filler": None if filler is None else str(filler),
        "seed": seed,
        "accuracy": found,
        "source_named": {name: share and asdict(share) for name, share in named_sources.items()},
        "cells": [asdict(cell) for cell in cells],
        "versions": versions(),
    }
    if output.write(result):
        _print(cells)
        say(f"\n{found:.0%} found ({machine_of(decoder.model)})")
        if share := named_sources["answers"]:
            say(f"Of {share.trials} answers with the key in memory, {share} attended most to its chunk")
    if plot is not None:
        _draw(cells, f"{model or adapter}, memory: {result['backend']}", plot)


def _check_plot(plot: Path) -> None:
    """Check that the plot can be drawn and written, before the long work."""
    writable(plot)
    if plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InvalidArgumentError(f"--plot must end in .png, .svg or .pdf, got {str(plot)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError("--plot requires matplotlib: pip install 'memlong[plot]'")


def _print(cells: list[Cell]) -> None:
    depths = sorted({cell.depth for cell in cells})
    by_place = {(cell.length, cell.depth): cell.accuracy for cell in cells}
    rows = [
        (f"{length:,}", *(f"{by_place[length, depth]:.0%}" for depth in depths))
        for length in sorted({cell.length for cell in cells})
    ]
    print_table(("tokens", *(f"depth {depth:g}" for depth in depths)), rows)


def _draw(cells: list[Cell], title: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells})
    by_place = {(cell.length, cell.depth): cell.accuracy for cell in cells}
    figure, axis = plt.subplots(figsize=(2 + len(lengths), 1.5 + 0.5 * len(depths)), layout="constrained")
    grid = [[by_place[length, depth] for length in lengths] for depth in depths]
    picture = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            axis.text(column, row, f"{value:.0%}", ha="center", va="center")
    axis.set(title=title, xlabel="tokens", ylabel="depth of the pass key")
    figure.colorbar(picture, label="found")
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise InvalidArgumentError(
            f"Cannot write {str(path)!r}: {error.strerror or error}. The result is printed without the plot"
        ) from error
    finally:
        plt.close(figure)
