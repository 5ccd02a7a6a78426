"""A 3B-shaped model on a 24 GB device: 80,000 tokens, then a million, with keys and values in host memory.

The weights are random, in OpenLLaMA-3B's shape; the device's allocator enforces the limit. A token's keys and values
take 333 kB in all 26 layers: 26.6 GB for the first stream, which stores every layer's own. The second stores one
layer's K-V, which four layers read, as in the MemLong paper: 12.8 kB per token, 12.8 GB in all. Pinned memory is
allocated in powers of two, so that these take 42 and 16 GB of the host.

    python bench/three_b.py --device cuda
    python bench/three_b.py --model random-tiny --tokens 8192,16384 --limit-gb 0
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from ratios import Ratio
from results import Budget, Report
from shapes import SHAPES, load
from tqdm import tqdm
from transformers import PreTrainedModel

from memlong import MemoryConfig, MemoryDecoder
from memlong.cli.values import numbers
from memlong.decoder import choose_machine
from memlong.errors import MemlongError

GB = 10**9
EVEN_SPEED = 0.9
"""Minimum speed in the last tenth of a stream relative to the second tenth."""
_MARKED = 8  # segments between checks of the clock, which synchronize with the device


@dataclass(frozen=True)
class Streamed:
    """Measurements of one stream."""

    kv_source: str
    wanted: int
    tokens: int
    seconds: float
    tokens_per_second: float
    late_to_early: float
    device_peak_bytes: int
    host_bytes: int
    resident_bytes: int


def main(
    model: Annotated[str, typer.Option(help=f"Random weights: {', '.join(SHAPES)}.")] = "random-3b",
    tokens: Annotated[
        str, typer.Option(help="Lengths of the two streams, comma-separated.")
    ] = "80000,1000000",
    limit_gb: Annotated[float, typer.Option(help="Limit of device memory in GB; 0 means none.")] = 24.0,
    seconds: Annotated[
        float,
        typer.Option(
            help="Time limit in seconds for loading and both streams; a stream that is cut short says so."
        ),
    ] = 170.0,
    segment_size: Annotated[int, typer.Option(help="Tokens per forward call.")] = 512,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16', 'float16' or 'auto'.")] = "auto",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', 'cuda:N', 'mps' or 'auto'.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result to this file.")
    ] = None,
) -> None:
    """Stream long texts of random tokens through a model of 3B parameters."""
    dtype, device = choose_machine(dtype, device).names
    if limit_gb and device.startswith("cuda"):
        number = torch.device(device).index or 0
        total = torch.cuda.get_device_properties(number).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * GB / total), number)
    facts = {"model": model, "dtype": dtype, "segment_size": segment_size, "limit_gb": limit_gb}
    report = Report(json_file, facts, device, Budget(seconds))
    language_model, tokenizer = load(model, dtype=dtype, device=device)
    first, second = numbers("--tokens", tokens, int)
    own = MemoryConfig(**_common(device, segment_size))
    middle = language_model.config.num_hidden_layers // 2
    readers = range(middle, language_model.config.num_hidden_layers, 4)
    shared = MemoryConfig(
        kv_source="shared",
        memory_layer=middle,
        retrieval_layers=",".join(map(str, readers)),
        **_common(device, segment_size),
    )
    done: list[Streamed] = []
    for config, length in ((own, first), (shared, second)):
        _give_back_pinned()
        row: Streamed | None = None
        try:
            with MemoryDecoder(language_model, tokenizer, config) as decoder:
                for row in _stream(decoder, language_model, length, report.budget):
                    report.ratios = _ratios([*done, row], limit_gb)
                    report.add({"rows": [asdict(each) for each in (*done, row)]})
        except torch.OutOfMemoryError as error:
            report.leave_out(f"the rest of {length:,} tokens, {config.kv_source}", str(error).split(". ")[0])
        if row is not None:
            done.append(row)
            typer.echo(_line(row))
    for ratio in report.ratios:
        typer.echo(str(ratio))
    report.end()


def _line(row: Streamed) -> str:
    short = "" if row.tokens == row.wanted else f" of {row.wanted:,} before time ran out"
    return (
        f"K-V source {row.kv_source}: {row.tokens:,} tokens{short}, {row.tokens_per_second:,.0f} tokens/s, device "
        f"peak {row.device_peak_bytes / GB:.1f} GB, {row.host_bytes / GB:.1f} GB of K-V in the bank"
    )


def _ratios(rows: list[Streamed], limit_gb: float) -> list[Ratio]:
    ratios = [
        Ratio(f"speed late to early, {row.kv_source}", row.late_to_early, EVEN_SPEED, at_least=True)
        for row in rows
    ]
    if limit_gb:
        peak = max(row.device_peak_bytes for row in rows)
        ratios.append(Ratio(f"device memory to {limit_gb:g} GB", peak / (limit_gb * GB), 1.0))
    return ratios + [
        Ratio(f"tokens read to wanted, {row.kv_source}", row.tokens / row.wanted, 1.0, at_least=True)
        for row in rows
    ]


def _give_back_pinned() -> None:
    """Release the previous stream's pinned host memory, which torch would cache."""
    gc.collect()
    empty = getattr(torch._C, "_host_emptyCache", None)  # noqa: SLF001 - torch has no public name for it
    if torch.cuda.is_available() and empty is not None:
        empty()


def _common(device: str, segment_size: int) -> dict[str, Any]:
    return {
        "retriever": "lm",
        "segment_size": segment_size,
        "store": {"host": "all"},
        "backend_options": {"device": device},
    }


def _stream(
    decoder: MemoryDecoder, model: PreTrainedModel, length: int, budget: Budget
) -> Iterator[Streamed]:
    """Read random tokens, and yield measurements along the way."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = decoder.config.segment_size
    every = step * max(1, min(_MARKED, length // step // 20))
    generator = torch.Generator().manual_seed(0)
    marks = [(0, time.perf_counter())]
    for start in tqdm(range(0, length, step), unit_scale=step, unit="tok", leave=False):
        count = min(step, length - start)
        decoder.read(torch.randint(3, model.config.vocab_size, (1, count), generator=generator))
        read = start + count
        if read % every and read < length and not budget.is_spent:
            continue
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append((read, time.perf_counter()))
        yield Streamed(
            decoder.config.kv_source,
            length,
            read,
            marks[-1][1] - marks[0][1],
            _speed(marks[0], marks[-1]),
            _late_to_early(marks),
            torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
            sum(bank.nbytes for bank in decoder.banks),
            psutil.Process().memory_info().rss,
        )
        if budget.is_spent:
            break


def _speed(one: tuple[int, float], other: tuple[int, float]) -> float:
    return (other[0] - one[0]) / (other[1] - one[1])


def _late_to_early(marks: list[tuple[int, float]]) -> float:
    """Speed in the last tenth relative to the second tenth."""
    count = len(marks) - 1
    tenth = max(1, count // 10)
    end = min(2 * tenth, count)
    return _speed(marks[-1 - tenth], marks[-1]) / _speed(marks[end - tenth], marks[end])


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"bench: {error}") from error
