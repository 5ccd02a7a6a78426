"""Compare storing and retrieving with another package's memory, on the same vectors.

The peer is the k-nearest-neighbor memory of memorizing-transformers-pytorch: one FAISS graph (HNSW, 15 links, FAISS's
default efConstruction and efSearch), with keys and values in a memory-mapped file. It is compared with a bank on the
same graph (`HNSW15`, same parameters) and with the exact one; as in the peer, each vector has a key and a value of the
same width. One thread, alternating, wall-clock time; recall by score.

If the peer is not installed, it is skipped with a message:

    pip install --no-deps memorizing-transformers-pytorch einops einops-exts filelock joblib
    python bench/peers.py --chunks 10000 --json out/peers.json
"""

from __future__ import annotations

import importlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from ratios import Clock, Ratio, best_times, summary
from raw import use_one_thread
from results import write
from torch import Tensor
from vectors import PART, Data, K

from memlong import MemlongError, Registry

PEER = "memorizing-transformers-pytorch"
BATCHES = (1, 32)
QUERIES = 256
NEW = 4096
BANKS: dict[str, tuple[str, dict[str, Any]]] = {
    "memlong, the same graph": ("faiss", {"index": "HNSW15", "ef_construction": 40, "ef_search": 16}),
    "memlong, exact": ("torch", {}),
}


class Memory(ABC):
    """A memory of vectors, each stored as a key and a value."""

    @abstractmethod
    def store(self, vectors: Tensor) -> None:
        """Store vectors [n, dim], each as key and as value."""

    @abstractmethod
    def retrieve(self, queries: Tensor) -> Tensor:
        """Fetch the keys and values of the nearest vectors, and return the keys [q, K, dim]."""


class Bank(Memory):
    """A bank of memlong."""

    def __init__(self, dim: int, backend: str, options: dict[str, Any]) -> None:
        self._bank = Registry().create_bank(backend, dim, metric="inner_product", **options)

    def store(self, vectors: Tensor) -> None:
        """Add chunks of one token."""
        pairs = vectors[:, None, None, None]
        self._bank.add(vectors, pairs, pairs, [(0, 1)] * len(vectors))

    def retrieve(self, queries: Tensor) -> Tensor:
        """Retrieve."""
        return self._bank.retrieve(queries, K).keys.flatten(2)


class Peer(Memory):
    """The memory of memorizing-transformers-pytorch, with one row, in this process."""

    def __init__(self, dim: int, capacity: int, file: Path) -> None:
        module = importlib.import_module("memorizing_transformers_pytorch.knn_memory")
        self._memory = module.KNNMemory(
            dim, max_memories=capacity, memmap_filename=str(file), multiprocessing=False
        )

    def store(self, vectors: Tensor) -> None:
        """Add pairs [1, n, 2, dim]."""
        self._memory.add(torch.stack([vectors, vectors], dim=1)[None])

    def retrieve(self, queries: Tensor) -> Tensor:
        """Search."""
        return self._memory.search(queries[None], K)[0][0, :, :, 0]


@contextmanager
def memories(dim: int, capacity: int) -> Iterator[dict[str, Memory]]:
    """Return the empty memories by name; the peer's only if installed."""
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Memory] = {name: Bank(dim, *bank) for name, bank in BANKS.items()}
        try:
            found = {PEER: Peer(dim, capacity, Path(folder, "peer")), **found}
        except ImportError as error:
            print(
                f"Skipped {PEER} ({error}): pip install --no-deps {PEER} einops einops-exts filelock joblib"
            )
        yield found


def main(
    chunks: Annotated[int, typer.Option(min=K, help="Vectors in each memory.")] = 10_000,
    dim: Annotated[int, typer.Option(min=1, help="Dimension of the embeddings.")] = 384,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per system; the best counts.")] = 5,
    out: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
) -> None:
    """Compare banks with another package's memory.

    \b
    Examples:
      python bench/peers.py --chunks 10000 --json out/peers.json
    """  # noqa: D301
    use_one_thread()
    data = Data.drawn(chunks, dim, NEW, QUERIES)
    stored, new, queries = (torch.from_numpy(each) for each in (data.stored, data.new, data.queries))
    seconds: dict[str, dict[str, float]] = {}
    with memories(dim, chunks + NEW) as systems:
        recalls = {}
        for name, memory in systems.items():
            for part in stored.split(PART):
                memory.store(part)
            scores = torch.einsum("qd,qkd->qk", queries, memory.retrieve(queries))
            recalls[name] = (scores >= torch.from_numpy(data.least)[:, None] - 1e-6).float().mean().item()
        for batch in BATCHES:
            asked, added = queries.split(batch), new.split(batch)
            calls = {
                "retrieve": lambda memory, number, asked=asked: memory.retrieve(asked[number % len(asked)]),
                "store": lambda memory, number, added=added: memory.store(added[number % len(added)]),
            }
            for act, call in calls.items():
                seconds[f"{act} {batch}"] = best_times(
                    {
                        name: lambda number, memory=memory, call=call: call(memory, number)
                        for name, memory in systems.items()
                    },
                    clock=Clock.WALL,
                    rounds=rounds,
                    most_calls=max(64 // batch, 2),
                )
    ratios = [
        Ratio(f"{act} by {name} to {PEER}", times[name] / times[PEER], None if "exact" in name else 1.0)
        for act, times in seconds.items()
        if PEER in times
        for name in BANKS
    ]
    for name, recall in recalls.items():
        each = ", ".join(f"{act} {1000 * times[name]:.3f} ms" for act, times in seconds.items())
        print(f"{name}: recall@{K} {recall:.3f}, {each}")
    facts = {"chunks": chunks, "dim": dim, "clock": Clock.WALL, "recall": recalls, "seconds": seconds}
    write(out, facts, ratios)
    print(summary(ratios))


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"peers: {error}") from error
