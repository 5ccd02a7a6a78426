"""Cost of snapshots: saving a bank against writing the same bytes, loading it against reading them.

All alternate in one process, on the same disk. Saving and writing include fsync; files are dropped from the page cache
before loading and reading. Ratios are of the best times.

    make bench
    python bench/snapshots.py --gigabytes 1 --backend hnswlib --folder /tmp --json out/snapshots.json
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from memlong import MemlongError, create_bank, load_bank
from memlong.bank import MemoryBank
from memlong.versions import versions

DIM = 384
SHAPE = (30, 3, 128, 64)  # SmolLM2-135M: layers, K-V heads, chunk, head dimension
TARGETS = {"save": 0.5, "load": 0.5, "incremental": 0.05}


def main(
    gigabytes: Annotated[float, typer.Option(min=0, help="Gigabytes of keys and values.")] = 1.0,
    backend: Annotated[str, typer.Option(help="Backend by name.")] = "torch",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each; the best counts.")] = 3,
    folder: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            writable=True,
            help="Folder to write to; a temporary one by default.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
) -> None:
    """Compare snapshots with plain files."""
    bank = create_bank(backend, DIM)
    chunks = max(100, int(gigabytes * 1e9 / (4 * torch.Size(SHAPE).numel())))
    fill(bank, chunks)
    times: dict[str, list[float]] = {
        name: [] for name in ("write", "save", "read", "load", "lazy load", "incremental")
    }
    with tempfile.TemporaryDirectory(dir=folder) as place:
        home = Path(place, "bank")
        for turn in range(rounds):
            shutil.rmtree(home, ignore_errors=True)
            times["save"].append(timed(lambda: bank.save(home, compact=True)))
            content = {path.name: path.read_bytes() for path in home.iterdir()}
            size = sum(map(len, content.values()))
            times["write"].append(timed(lambda content=content: write(content, Path(place, "plain"))))
            del content
            shutil.rmtree(Path(place, "plain"))
            cool(home)
            times["read"].append(timed(lambda: read(home)))
            cool(home)
            times["load"].append(timed(lambda: load_bank(home)))
            cool(home)
            times["lazy load"].append(timed(lambda: load_bank(home, lazy=True)))
            bank.evict(chunks // 100)
            fill(bank, chunks // 100, seed=turn + 1)
            times["incremental"].append(timed(lambda: bank.save(home)))
    report(times, size, backend, chunks, out)


def fill(bank: MemoryBank, chunks: int, seed: int = 0) -> None:
    """Add random chunks, a few at a time."""
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, chunks, 16):
        count = min(16, chunks - first)
        keys = torch.randn(count, *SHAPE, generator=generator).to(torch.bfloat16)
        start = 128 * bank.next_id
        spans = [(start + 128 * each, start + 128 * each + 128) for each in range(count)]
        bank.add(torch.randn(count, DIM, generator=generator), keys, keys, spans)


def write(content: dict[str, bytes], folder: Path) -> None:
    """Write files, with fsync."""
    folder.mkdir()
    for name, data in content.items():
        with (folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def read(folder: Path) -> None:
    """Read every file into its own buffer."""
    for path in folder.iterdir():
        path.read_bytes()


def cool(folder: Path) -> None:
    """Drop the files from the page cache, where supported."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def report(times: dict[str, list[float]], size: int, backend: str, chunks: int, out: Path | None) -> None:
    """Print the ratios, and write them to a file."""
    best = {name: min(each) for name, each in times.items()}
    plain = {"save": "write", "load": "read", "lazy load": "read"}
    speed = {name: best[other] / best[name] for name, other in plain.items()}
    share = best["incremental"] / best["save"]
    print(f"{backend}, {chunks:,} chunks, {size / 1e9:.2f} GB; {platform.machine()}")
    for name, seconds in best.items():
        print(f"{name:12} {seconds:7.2f} s")
    print(f"save: {speed['save']:.2f} times the speed of a plain write (target: {TARGETS['save']})")
    print(f"load: {speed['load']:.2f} times the speed of a plain read (target: {TARGETS['load']})")
    print(
        f"save with 1 % new: {share:.3f} of the time of a full one (target: under {TARGETS['incremental']})"
    )
    if out is not None:
        result: dict[str, Any] = {"backend": backend, "chunks": chunks, "bytes": size, "seconds": times}
        result |= {"speed_to_plain": speed, "incremental_share": share, "versions": versions()}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"bench: {error}") from error
