"""Overhead of a bank over the bare index library: adding, searching and retrieving, timed alternately in one process.

Each backend and its library hold the same vectors with the same settings, in one thread. The result is the ratio of
the best times; the targets, at 10,000 chunks, are 1.1 for searching and adding in batches of 32, and 1.3 one by one.
The bare library (raw.py) keeps no ids, spans, keys or values, never evicts, and validates nothing. Keys and values are
minimal, so that only the index is measured (kv.py measures the rest), and stay on the CPU. With `--device cuda`, torch
and FAISS search on the GPU, and backends that cannot are skipped.

The vectors are drawn around random centers, one for every 50: recall on such clusters differs from recall on
embeddings of text, which bench/backends.py measures.

    make bench
    python bench/bank.py --sizes 10000 --dims 384 --backend torch --backend hnswlib
    python bench/bank.py --sizes 1000000 --dims 384 --graphs-up-to 1000000 --json out/bank.json     # hours
    python bench/bank.py --sizes 10000 --dims 384 --plot out/bank.png
    python bench/bank.py --sizes 1000,100000 --device cuda
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from paired import BATCHES, SETTINGS, SWEEP, Row, measure
from ratios import Clock, Ratio
from raw import use_one_thread
from results import Budget, Report
from rich import box
from rich.console import Console
from rich.table import Table
from setting import Setting
from tqdm import tqdm
from vectors import Data, K

from memlong import MemlongError, Registry
from memlong.errors import DeviceUnavailableError

QUERIES = 256
ROUNDS = 5
NEW = 4096  # vectors to add after the index is built


def main(
    sizes: Annotated[
        str, typer.Option(help="Numbers of chunks in the bank, comma-separated.")
    ] = "1000,10000,100000",
    dims: Annotated[str, typer.Option(help="Dimensions of the embeddings, comma-separated.")] = "384,1024",
    backend: Annotated[list[str] | None, typer.Option(help="Only this backend; repeatable.")] = None,
    graphs_up_to: Annotated[int, typer.Option(min=1, help="Largest bank to build graphs for.")] = 10_000,
    device: Annotated[
        str, typer.Option(help="Where the indexes compute: 'cpu', 'cuda' or 'cuda:N'.")
    ] = "cpu",
    clock: Annotated[
        Clock | None,
        typer.Option(
            help="'cpu': CPU time of this process, unaffected by other load; or 'wall'.  [default: cpu, or wall if "
            "--device is not the CPU]"
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Plot queries per second against recall, for the first of --dims and the largest bank with graphs."
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Start no new setting after this many seconds; those skipped are listed."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
) -> None:
    """Compare each backend with its bare library.

    \b
    Examples:
      python bench/bank.py --sizes 10000 --dims 384 --backend torch
      python bench/bank.py --sizes 10000 --dims 384 --plot out/bank.png
    """  # noqa: D301
    use_one_thread()
    counts, widths = _numbers("--sizes", sizes), _numbers("--dims", dims)
    drawn = (widths[0], max((count for count in counts if count <= graphs_up_to), default=counts[0]))
    where = _device(device)
    told = clock or (Clock.CPU if where.type == "cpu" else Clock.WALL)
    settings = _able([each for each in (*SETTINGS, *SWEEP) if not backend or each.backend in backend], where)
    jobs = [
        (dim, count, setting)
        for dim in widths
        for count in counts
        for setting in settings
        if setting in SETTINGS or (plot is not None and (dim, count) == drawn)
        if setting.is_exact or count <= graphs_up_to
    ]
    facts = {"vectors": "around random centers, one for every 50", "k": K, "clock": told}
    report = Report(out, facts, device, Budget(seconds))
    rows: list[Row] = []
    data: tuple[int, int, Data] | None = None
    with tqdm(jobs, unit="setting", disable=None) as bar:
        for dim, count, setting in bar:
            what = f"{setting.name}, {count:,} x {dim}"
            bar.set_postfix_str(what)
            if rows and report.budget.is_spent:
                report.leave_out(what)
                continue
            if data is None or data[:2] != (dim, count):
                data = dim, count, Data.drawn(count, dim, NEW, QUERIES)
            rows.append(measure(setting, data[2], told, where, ROUNDS))
            report.ratios = _ratios(rows)
            report.add({"rows": [asdict(row) for row in rows]})
    _show(rows)
    if plot is not None:
        _draw([row for row in rows if (row.dim, row.chunks) == drawn], plot)
    report.end()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name!r} is not 'cpu', 'cuda' or 'cuda:N'", param_hint="--device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise typer.BadParameter(f"{name!r}, but torch sees {found} CUDA devices", param_hint="--device")
    return device


def _able(settings: Sequence[Setting], device: torch.device) -> list[Setting]:
    """Return the settings that can compute on the device, and print why the others cannot."""
    able = []
    for setting in settings:
        try:
            Registry().create_bank(setting.backend, 64, device=str(device), **setting.options)
        except DeviceUnavailableError as error:
            if setting in SETTINGS:
                print(f"Skipped {setting.name}: {error}")
        else:
            able.append(setting)
    return able


def _ratios(rows: list[Row]) -> list[Ratio]:
    """Return the ratios to the libraries, and those of exact search with torch to FAISS."""
    found = [ratio for row in rows for ratio in row.ratios]
    by_place = {(row.setting, row.dim, row.chunks): row for row in rows}
    for row in rows:
        flat = by_place.get(("faiss Flat", row.dim, row.chunks))
        if row.setting == "torch" and flat is not None:
            target = 1.0 if (row.dim, row.chunks) == (384, 100_000) else None
            found += [
                Ratio(
                    f"search {batch} of torch to faiss Flat, {row.chunks:,} x {row.dim}",
                    row.bank[f"search {batch}"] / flat.bank[f"search {batch}"],
                    target,
                )
                for batch in BATCHES
            ]
    return found


def _show(rows: list[Row]) -> None:
    table = Table(box=box.MARKDOWN)
    table.add_column("setting")
    acts = list(rows[0].bank) if rows else []
    for title in ("dim", "chunks", "recall@8", "index, B", *(f"{act}, ms (to raw)" for act in acts)):
        table.add_column(title, justify="right")
    for row in rows:
        times = [f"{1000 * row.bank[act]:.4g} ({row.bank[act] / row.raw[act]:.2f})" for act in acts]
        size = f"{row.index_bytes / row.chunks:,.0f}"
        table.add_row(row.setting, str(row.dim), f"{row.chunks:,}", f"{row.recall:.3f}", size, *times)
    Console(width=240).print(table)


def _draw(rows: list[Row], path: Path) -> None:
    """Plot single queries per second against recall: the best of each kind, and the bare library's in gray."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for kind in dict.fromkeys(row.setting.partition(",")[0] for row in rows):
        own = [row for row in rows if row.setting.partition(",")[0] == kind]
        bank = sorted((row.recall, 1 / row.bank["search 1"]) for row in own)
        library = sorted((row.raw_recall, 1 / row.raw["search 1"]) for row in own)
        (line,) = axes.plot(*zip(*bank, strict=True), marker="o", label=f"{kind}")
        axes.plot(*zip(*library, strict=True), marker=".", linestyle=":", color=line.get_color(), alpha=0.5)
    axes.set(xlabel="recall@8", ylabel="queries per second, one at a time", yscale="log")
    axes.set_title(
        f"{rows[0].chunks:,} clustered vectors of dimension {rows[0].dim}; dotted: the bare library"
    )
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(each) for each in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise typer.BadParameter(
            f"{text!r} is not a comma-separated list of positive integers", param_hint=option
        )
    return numbers


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"bank: {error}") from error
