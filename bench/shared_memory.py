"""Ten sessions over one base: what they take beside one session, how fast they open, and what retrieval costs.

The base is on disk and is loaded once; each session is a bank of its own over it. Beside them stands one bank that
holds the same chunks. Keys and values are small here, since they stay on disk in either case. Then several processes
load the base, saved as they can share its embeddings (compact=True) and as they cannot.

    python bench/shared_memory.py --chunks 100000 --json out/shared_memory.json
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from ratios import Ratio, best_times, summary
from results import write

from memlong import LayeredBank, create_bank, load_bank
from memlong.bank import MemoryBank

SHAPE = (2, 1, 16, 8)  # layers, K-V heads, chunk, head dimension
BATCH = 10_000
PROCESS = """
import sys, torch
from memlong import load_bank
bank = load_bank(sys.argv[1], lazy=True)
bank.search(torch.ones(1, int(sys.argv[2])), 1)
print(flush=True)
sys.stdin.read()
"""


def main(
    chunks: Annotated[int, typer.Option(min=1, help="Chunks of the base.")] = 100_000,
    own: Annotated[int, typer.Option(min=1, help="Chunks of each session.")] = 100,
    sessions: Annotated[int, typer.Option(min=2, help="Sessions.")] = 10,
    processes: Annotated[int, typer.Option(min=1, help="Processes that load the base.")] = 4,
    dim: Annotated[int, typer.Option(min=1, help="Width of the embeddings.")] = 384,
    backend: Annotated[str, typer.Option(help="Backend of the base and of sessions.")] = "torch",
    out: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
) -> None:
    """Compare sessions over a base with one session, and with one bank."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "base")
        whole = create_bank(backend, dim)
        fill(whole, chunks, generator)
        whole.save(folder)
        del whole
        begun = resident()
        base = load_bank(folder, lazy=True)
        query = torch.randn(1, dim, generator=generator)
        base.search(query, 1)
        used, opened, banks = [], [], []
        for _ in range(sessions):
            started = time.perf_counter()
            bank = LayeredBank(create_bank(backend, dim), [base])
            bank.search(query, 1)
            opened.append(time.perf_counter() - started)
            fill(bank, own, generator)
            banks.append(bank)
            used.append(resident() - begun)
        tops = sum(bank.resident_bytes for bank in banks[1:])
        merged = create_bank(backend, dim)
        for each in (base, banks[0].top):
            copy(each, merged)
        queries = torch.randn(64, 1, dim, generator=generator)
        times = best_times(
            {
                "layers": lambda turn: banks[0].retrieve(queries[turn % 64], 8),
                "one bank": lambda turn: merged.retrieve(queries[turn % 64], 8),
            },
            rounds=15,
        )
        shared = Path(place, "shared")
        load_bank(folder).save(shared, compact=True)
        resident_of = {
            name: {count: proportional(path, count, dim) for count in (1, processes)}
            for name, path in (("own embeddings", folder), ("shared embeddings", shared))
        }
        same = all(
            torch.equal(banks[0].search(query, 8).scores, merged.search(query, 8).scores) for query in queries
        )
    ratios = [
        Ratio(
            f"memory of {sessions} sessions, without their own chunks, to one's",
            (used[-1] - tops) / used[0],
            1.1,
        ),
        Ratio("retrieval over a base to retrieval of one bank", times["layers"] / times["one bank"], 1.2),
    ]
    facts: dict[str, Any] = {
        "chunks": chunks,
        "own": own,
        "sessions": sessions,
        "dim": dim,
        "backend": backend,
        "resident_bytes": {"one session": used[0], "all sessions": used[-1], "their own chunks": tops},
        "bytes_of_processes": resident_of,
        "seconds_to_open": {"median": statistics.median(opened[1:]), "most": max(opened[1:])},
        "seconds_to_retrieve": times,
        "same_scores": same,
    }
    typer.echo(f"resident: one session {used[0] / 1e6:.1f} MB, {sessions} sessions {used[-1] / 1e6:.1f} MB")
    typer.echo(f"opening a session: {facts['seconds_to_open']['median'] * 1e3:.2f} ms, search included")
    typer.echo(
        f"retrieving: {times['layers'] * 1e3:.2f} ms over a base, {times['one bank'] * 1e3:.2f} ms from one bank"
    )
    for name, found in resident_of.items():
        told = ", ".join(f"{count}: {taken / 1e6:,.0f} MB" for count, taken in found.items())
        typer.echo(f"processes with {name}: {told}")
    typer.echo(f"the same scores: {'yes' if same else 'no'}")
    write(out, facts, ratios)
    typer.echo(summary(ratios))


def resident() -> int:
    """Bytes of memory that this process has."""
    found: int = psutil.Process().memory_info().rss
    return found


def proportional(folder: Path, count: int, dim: int) -> int:
    """Bytes that so many processes take in all that have loaded a bank and searched it; shared ones count once."""
    command = [sys.executable, "-c", PROCESS, str(folder), str(dim)]
    running = []
    try:
        while len(running) < count:
            running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))  # noqa: S603
        for each in running:
            assert each.stdout is not None  # noqa: S101 - it is a pipe
            if not each.stdout.readline():
                raise SystemExit("shared_memory: a process that loads the base has ended")
        return sum(psutil.Process(each.pid).memory_full_info().pss for each in running)
    finally:
        for each in running:
            each.communicate(b"")


def fill(bank: MemoryBank, count: int, generator: torch.Generator) -> None:
    """Add random chunks."""
    for start in range(0, count, BATCH):
        some = min(BATCH, count - start)
        keys = torch.randn(some, *SHAPE, generator=generator)
        spans = torch.arange(start, start + some)[:, None] * 16 + torch.tensor([0, 16])
        bank.add(torch.randn(some, bank.dim, generator=generator), keys, -keys, spans)


def copy(bank: MemoryBank, into: MemoryBank) -> None:
    """Add a bank's chunks to another."""
    held = bank.embeddings
    for start in range(0, len(held.ids), BATCH):
        part = slice(start, start + BATCH)
        found = bank.fetch(held.ids[part])
        into.add(held.embeddings[part], found.keys, found.values, found.spans)


if __name__ == "__main__":
    typer.run(main)
