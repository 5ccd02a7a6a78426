"""What a bank costs beside the index library by itself: adding, searching and retrieving, in turns, in one process.

Each backend and its library hold the same vectors with the same settings, in one thread. The ratio of the best times is
the result: at 10,000 chunks searching and adding are to take at most 1.1 times as long as by the library itself in
batches of 32, and 1.3 times one by one. What the library does is in raw.py; it keeps no ids, spans, keys or values, is
never evicted from, and checks nothing. Keys and values are as small as can be, so that the index is what is measured
(kv.py measures the rest).

The vectors are drawn at random about centres, as many as a fiftieth of them: recall on such clusters is not that on
embeddings of text, which bench/backends.py measures.

    make bench
    python bench/bank.py --sizes 10000 --dims 384 --backend torch --backend hnswlib
    python bench/bank.py --sizes 1000000 --dims 384 --graphs-up-to 1000000 --json out/bank.json     # hours
    python bench/bank.py --sizes 10000 --dims 384 --plot out/bank.png
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from ratios import Clock, Ratio, best_times, summary
from raw import Raw, make_raw
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from vectors import PART, Data, K

from memlong import MemlongError, MemoryBank, Registry
from memlong.evaluation.environment import versions

QUERIES = 256
BATCHES = {1: 1.3, 32: 1.1}  # and their targets
TARGET_CHUNKS = 10_000
ROUNDS = 5
ROOM = 4096  # chunks that the measuring may add
NEW = 4096  # vectors to add when the index is built


@dataclass(frozen=True)
class Setting:
    """A backend and its options, which its library takes as well."""

    backend: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How tables call it."""
        options = ", ".join(
            f"{option}={value}" for option, value in self.options.items() if option != "index"
        )
        kind = f"{self.backend} {self.options.get('index', '')}".strip()
        return f"{kind}, {options}" if options else kind

    @property
    def is_exact(self) -> bool:
        """Whether it finds the true best."""
        return self.backend == "torch" or self.options.get("index") == "Flat"


SETTINGS = (
    Setting("torch"),
    Setting("faiss", {"index": "Flat"}),
    Setting("faiss", {"index": "HNSW32"}),
    Setting("hnswlib"),
)
SWEEP = (
    *(Setting("hnswlib", {"ef": ef}) for ef in (8, 16, 32, 128, 256)),
    *(Setting("faiss", {"index": "HNSW32", "ef_search": ef}) for ef in (8, 16, 32, 128, 256)),
    *(Setting("faiss", {"index": "IVF64,Flat", "nprobe": lists}) for lists in (1, 4, 16)),
)


@dataclass(frozen=True)
class Row:
    """What was measured of a setting: seconds of the bank and of the library by what was done."""

    setting: str
    dim: int
    chunks: int
    recall: float
    raw_recall: float
    index_bytes: int
    bank: dict[str, float]
    raw: dict[str, float]

    @property
    def ratios(self) -> list[Ratio]:
        """The bank's times to the library's."""
        place = f"{self.setting}, {self.chunks:,} x {self.dim}"
        return [
            Ratio(f"{what} of {place}", seconds / self.raw[what], self._target(what))
            for what, seconds in self.bank.items()
        ]

    def _target(self, what: str) -> float | None:
        aimed = {f"{act} {batch}": most for batch, most in BATCHES.items() for act in ("search", "add")}
        is_aimed_at = self.chunks == TARGET_CHUNKS and self.setting in {each.name for each in SETTINGS}
        return aimed.get(what) if is_aimed_at else None


def main(
    sizes: Annotated[
        str, typer.Option(help="Chunks in the bank, separated by commas.")
    ] = "1000,10000,100000",
    dims: Annotated[str, typer.Option(help="Widths of the embeddings, separated by commas.")] = "384,1024",
    backend: Annotated[list[str] | None, typer.Option(help="Only this; may be repeated.")] = None,
    graphs_up_to: Annotated[
        int, typer.Option(min=1, help="The largest bank that graphs are built for.")
    ] = 10_000,
    clock: Annotated[
        Clock,
        typer.Option(help="'cpu', the time of this process, which other work does not spoil; or 'wall'."),
    ] = Clock.CPU,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw queries a second against recall here, at the first width and the largest size with graphs."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Set each backend beside its library by itself.

    \b
    Examples:
      python bench/bank.py --sizes 10000 --dims 384 --backend torch
      python bench/bank.py --sizes 10000 --dims 384 --plot out/bank.png
    """  # noqa: D301
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    counts, widths = _numbers("--sizes", sizes), _numbers("--dims", dims)
    drawn = (widths[0], max((count for count in counts if count <= graphs_up_to), default=counts[0]))
    jobs = [
        (dim, count, setting)
        for dim in widths
        for count in counts
        for setting in (*SETTINGS, *(SWEEP if plot is not None and (dim, count) == drawn else ()))
        if (not backend or setting.backend in backend) and (setting.is_exact or count <= graphs_up_to)
    ]
    rows: list[Row] = []
    data: tuple[int, int, Data] | None = None
    with tqdm(jobs, unit="setting", disable=None) as bar:
        for dim, count, setting in bar:
            bar.set_postfix_str(f"{setting.name}, {count:,} x {dim}")
            if data is None or data[:2] != (dim, count):
                data = dim, count, Data.drawn(count, dim, NEW, QUERIES)
            rows.append(measure(setting, data[2], clock))
            _write(rows, clock, out)
    _show(rows)
    if plot is not None:
        _draw([row for row in rows if (row.dim, row.chunks) == drawn], plot)
    print(summary(_ratios(rows)))


def measure(setting: Setting, data: Data, clock: Clock) -> Row:
    """Build bank and index, and do the same with both in turns."""
    bank = Registry().create_bank(setting.backend, data.stored.shape[1], **setting.options)
    library = make_raw(setting.backend, setting.options, data.stored, len(data.stored) + ROOM)
    seconds = {
        "build": {"bank": _timed(clock, _filling(bank, data)), "raw": _timed(clock, _filling(library, data))}
    }
    recalls = (
        data.recall(np.concatenate([bank.search(each[None], K).ids.numpy() for each in data.queries])),
        data.recall(library.search(data.queries, K)),
    )
    index_bytes = library.nbytes
    slab = torch.zeros(len(data.stored) + ROOM, 1, 1, 1, 1)
    for batch in BATCHES:
        queries = [data.queries[at : at + batch] for at in range(0, QUERIES, batch)]
        new = [data.new[at : at + batch] for at in range(0, NEW, batch)]
        searches: dict[str, Callable[[int], object]] = {
            "bank": lambda number, queries=queries: bank.search(queries[number % len(queries)], K),
            "raw": lambda number, queries=queries: library.search(queries[number % len(queries)], K),
        }
        retrievals: dict[str, Callable[[int], object]] = {
            "bank": lambda number, queries=queries: bank.retrieve(queries[number % len(queries)], K),
            "raw": lambda number, queries=queries: [
                slab[found] for found in [library.search(queries[number % len(queries)], K)] * 2
            ],
        }
        block, spans = torch.zeros(batch, 1, 1, 1, 1), [(0, 1)] * batch
        adds: dict[str, Callable[[int], object]] = {
            "bank": lambda number, new=new, block=block, spans=spans: bank.add(
                new[number % len(new)], block, block, spans
            ),
            "raw": lambda number, new=new: library.add(new[number % len(new)]),
        }
        seconds[f"search {batch}"] = best_times(searches, clock=clock, rounds=ROUNDS)
        seconds[f"retrieve {batch}"] = best_times(retrievals, clock=clock, rounds=ROUNDS)
        seconds[f"add {batch}"] = best_times(adds, clock=clock, rounds=ROUNDS, most_calls=max(64 // batch, 4))
    of_bank, of_raw = ({what: each[whose] for what, each in seconds.items()} for whose in ("bank", "raw"))
    return Row(setting.name, data.stored.shape[1], len(data.stored), *recalls, index_bytes, of_bank, of_raw)


def _filling(index: MemoryBank | Raw, data: Data) -> Callable[[], None]:
    def fill() -> None:
        for at in range(0, len(data.stored), PART):
            part = data.stored[at : at + PART]
            if isinstance(index, MemoryBank):
                block = torch.zeros(len(part), 1, 1, 1, 1)
                index.add(part, block, block, [(0, 1)] * len(part))
            else:
                index.add(part)

    return fill


def _timed(clock: Clock, act: Callable[[], None]) -> float:
    started = clock.now()
    act()
    return clock.now() - started


def _ratios(rows: list[Row]) -> list[Ratio]:
    """Return those to the libraries, and those of exact search by torch to that by FAISS."""
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


def _write(rows: list[Row], clock: Clock, out: Path | None) -> None:
    if out is None:
        return
    ratios = [asdict(ratio) | {"beyond": ratio.is_beyond} for ratio in _ratios(rows)]
    figures = {
        "machine": {"cores": os.cpu_count(), "threads": 1, "clock": clock},
        "vectors": "about random centres, a fiftieth as many",
        "k": K,
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
        "ratios": ratios,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _draw(rows: list[Row], path: Path) -> None:
    """Draw queries a second, one at a time, against recall: the best of each kind, and the library's in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for kind in dict.fromkeys(row.setting.partition(",")[0] for row in rows):
        own = [row for row in rows if row.setting.partition(",")[0] == kind]
        bank = sorted((row.recall, 1 / row.bank["search 1"]) for row in own)
        library = sorted((row.raw_recall, 1 / row.raw["search 1"]) for row in own)
        (line,) = axes.plot(*zip(*bank, strict=True), marker="o", label=f"{kind}")
        axes.plot(*zip(*library, strict=True), marker=".", linestyle=":", color=line.get_color(), alpha=0.5)
    axes.set(xlabel="recall@8", ylabel="queries a second, one at a time", yscale="log")
    axes.set_title(
        f"{rows[0].chunks:,} clustered vectors of {rows[0].dim} numbers; dotted: the library by itself"
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
            f"{text!r} is not whole numbers above 0, separated by commas", param_hint=option
        )
    return numbers


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"bank: {error}") from error
