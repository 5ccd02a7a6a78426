"""Does any part of the streaming loop slow down as the text gets longer? Time the parts at two lengths.

Two streams of the same text, one shorter than the other, read their last segments alternately, so that other load on
the machine affects both. The loop's own cost shows best with a tiny random model, which takes a minute; with a real
model it is small in comparison.

    python bench/profile_stream.py
    python bench/profile_stream.py --model demo --lengths 8192,65536 --json out/profile_demo.json
"""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from parts import PARTS, watched
from ratios import Clock, Ratio, summary
from results import write
from shapes import MODEL_HELP, load
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from memlong import MemoryConfig, MemoryDecoder
from memlong.cli.values import numbers
from memlong.decoder import choose_machine
from memlong.errors import MemlongError
from memlong.evaluation import read_text, tokenize

TARGET = 1.1
GROWS = "search"
SMALLEST = 0.01  # minimum share of a segment's time for a part to have a target


def main(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "random-tiny",
    lengths: Annotated[str, typer.Option(help="Two lengths in tokens, comma-separated.")] = "8192,200192",
    segments: Annotated[int, typer.Option(help="Segments to time before each length.")] = 24,
    backend: Annotated[str, typer.Option(help="Memory backend.")] = "torch",
    retriever: Annotated[str, typer.Option(help="Retriever by name.")] = "lm",
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16', 'float16' or 'auto'.")] = "auto",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', 'cuda:N', 'mps' or 'auto'.")] = "auto",
    clock: Annotated[
        Clock,
        typer.Option(help="'wall', or 'cpu': CPU time of this process, unaffected by other load."),
    ] = Clock.WALL,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result to this file.")
    ] = None,
) -> None:
    """Time the parts of a stream's segments at two lengths."""
    early, late = sorted(numbers("--lengths", lengths, int))
    dtype, device = choose_machine(dtype, device).names
    language_model, tokenizer = load(model, dtype=dtype, device=device)
    config = MemoryConfig(backend=backend, retriever=retriever)
    step = config.segment_size
    ids = _tokens(language_model, tokenizer, late)
    decoders = {length: MemoryDecoder(language_model, tokenizer, config) for length in (late, early)}
    at: dict[int, list[dict[str, float]]] = {early: [], late: []}
    for length, decoder in decoders.items():
        with decoder:
            for part in tqdm(
                ids[:, : length - segments * step].split(step, dim=1), unit="segment", leave=False
            ):
                decoder.read(part)
    for number in range(-segments, 0):
        for length, decoder in decoders.items():
            part = ids[:, length + number * step : length + (number + 1) * step]
            with decoder, watched(decoder, clock) as watch:
                watch.reset()
                decoder.read(part)
                at[length].append(watch.read())
    rows = {
        length: {part: median(row[part] for row in found) for part in PARTS} for length, found in at.items()
    }
    ratios = _ratios(rows[early], rows[late])
    typer.echo(f"{'ms per segment':14s}{early:>12,}{late:>12,}       ratio")
    for ratio in ratios:
        part = ratio.name
        first, last = (1000 * _of(rows[length], part) for length in (early, late))
        typer.echo(f"{part:14s}{first:12.3f}{last:12.3f}{ratio.value:12.3f}")
    facts = {"model": model, "backend": backend, "retriever": retriever, "dtype": dtype, "clock": clock}
    milliseconds = {
        str(length): {part: 1000 * spent for part, spent in row.items()} for length, row in rows.items()
    }
    write(json_file, {**facts, "ms_per_segment": milliseconds}, ratios, device)
    typer.echo(summary(ratios))


def _ratios(early: dict[str, float], late: dict[str, float]) -> list[Ratio]:
    """Late over early, for each part and for all but the search; very small parts have no target."""
    least = SMALLEST * sum(late.values())
    found = [
        Ratio(part, late[part] / early[part], TARGET if part != GROWS and late[part] >= least else None)
        for part in PARTS
        if early[part]
    ]
    return [*found, Ratio(ALL_BUT, _of(late, ALL_BUT) / _of(early, ALL_BUT), TARGET)]


ALL_BUT = f"all but {GROWS}"


def _of(row: dict[str, float], part: str) -> float:
    return row[part] if part in row else sum(row.values()) - row[GROWS]


def _tokens(model: PreTrainedModel, tokenizer: Any, count: int) -> Tensor:
    """Tokens [1, count] of Python's library, or random ones for a model without a tokenizer."""
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, model.config.vocab_size, (1, count), generator=generator)
    found: list[Tensor] = []
    for file in sorted(Path(inspect.getfile(typing)).parent.glob("*.py")):
        found.append(tokenize(tokenizer, read_text(file)))
        if sum(each.shape[1] for each in found) >= count:
            break
    return torch.cat(found, dim=1)[:, :count]


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"bench: {error}") from error
