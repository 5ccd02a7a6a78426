"""How fast the keys and values of retrieved chunks are gathered, compared with a plain copy of the same bytes.

By default, blocks have the demo model's shape (30 layers, 3 heads, chunks of 128 tokens, head dimension 64, bfloat16:
2.9 MB of keys and as much of values). "As they come" is the default store of banks; the others are tiers of
TieredStore, in host memory and on disk, also with fewer bits. A plain copy clones a slice of one tensor of keys and one
of values. The disk tier is compared with a plain read of as many records into one buffer, from a file in the page
cache, where the tier's own file is. The target is at least 0.7 of the speed of a plain copy in memory.

    make bench
    python bench/kv.py --k 8 --layers 16 --heads 8 --head-dim 128 --json out/kv.json
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np
import torch
import typer
from ratios import Clock, Ratio, best_times, summary
from results import write
from torch import Tensor

from memlong import MemlongError
from memlong.bank import InMemoryStore, TieredStore

TARGET = 0.7


def main(
    k: Annotated[int, typer.Option(min=1, help="Chunks to gather at once.")] = 8,
    held: Annotated[
        int, typer.Option(min=1, help="Chunks in the store, from which those to gather are drawn.")
    ] = 32,
    layers: Annotated[int, typer.Option(min=1)] = 30,
    heads: Annotated[int, typer.Option(min=1)] = 3,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens in a chunk.")] = 128,
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per system; the best counts.")] = 15,
    folder: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder of the disk tier; a temporary one by default."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
) -> None:
    """Compare gathering keys and values with a plain copy.

    \b
    Examples:
      python bench/kv.py --json out/kv.json
      python bench/kv.py --k 32 --layers 16 --heads 8 --head-dim 128
    """  # noqa: D301
    torch.set_num_threads(1)
    blocks = [torch.randn(held, layers, heads, chunk, head_dim).bfloat16() for _ in range(2)]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        stores = {
            "as they come": InMemoryStore(),
            "host": TieredStore(host="all"),
            "host, int8": TieredStore(host="all", dtype="int8"),
            "host, float8": TieredStore(host="all", dtype="float8"),
            "disk": TieredStore(disk=place),
        }
        for store in stores.values():
            store.put(range(held), *blocks)
        rng = np.random.default_rng(0)
        wanted = [rng.choice(held, k, replace=k > held).tolist() for _ in range(64)]
        with Path(place, "records").open("w+b") as file:
            _write(file, blocks)
            systems: dict[str, Callable[[int], object]] = {
                name: lambda number, store=store: store.get(wanted[number % 64])
                for name, store in stores.items()
            }
            systems["plain copy"] = lambda number: _copy(blocks, number, k)
            systems["plain read"] = lambda number: _read(file, wanted[number % 64], 2 * blocks[0][0].nbytes)
            best = best_times(systems, clock=Clock.WALL, rounds=rounds, most_calls=16)
    nbytes = 2 * k * blocks[0][0].nbytes
    ratios = [
        Ratio(
            f"speed of {name} to a plain {'read' if name == 'disk' else 'copy'}",
            best["plain read" if name == "disk" else "plain copy"] / best[name],
            TARGET if name in {"as they come", "host"} else None,
            at_least=True,
        )
        for name in stores
    ]
    for name, seconds in best.items():
        print(f"{name:14s} {1000 * seconds:8.2f} ms, {nbytes / seconds / 1e9:6.2f} GB/s")
    for ratio in ratios:
        print(ratio)
    write(out, {"gathered_bytes": nbytes, "k": k, "clock": Clock.WALL, "seconds": best}, ratios)
    print(summary(ratios))


def _copy(blocks: list[Tensor], number: int, k: int) -> list[Tensor]:
    """Copy k adjacent blocks, different ones at each call."""
    first = number * k % max(len(blocks[0]) - k + 1, 1)
    return [states[first : first + k].clone() for states in blocks]


def _write(file: BinaryIO, blocks: list[Tensor]) -> None:
    """Write each chunk's keys, then its values."""
    for pair in zip(*blocks, strict=True):
        for states in pair:
            file.write(states.view(torch.uint8).numpy().tobytes())
    file.flush()


def _read(file: BinaryIO, wanted: list[int], record_bytes: int) -> np.ndarray:
    """Read records into a new buffer."""
    records = np.empty((len(wanted), record_bytes), dtype=np.uint8)
    for record, number in zip(records, wanted, strict=True):
        os.preadv(file.fileno(), [record.data], number * record_bytes)
    return records


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"kv: {error}") from error
