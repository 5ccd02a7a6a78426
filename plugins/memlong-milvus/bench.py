"""What a bank adds to Milvus: its searches and retrievals against pymilvus and plain reads, in turns, in one run.

python bench.py --start                           the server of ``pip install 'milvus==2.3.5'``, started for this
python bench.py --uri http://127.0.0.1:19530      a server of yours

Each query is asked in four ways, in an order drawn for each. "pymilvus" is `MilvusClient.search` for the same
eight hits of the same session at the same consistency; "reads" are the files of its hits, one after the other, put
together as one tensor, with nothing checked. Last, other sessions fill the collection, and a small one is asked.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pymilvus
import torch

from memlong_milvus.bank import MilvusBank
from memlong_milvus.rows import SessionRows
from memlong_milvus.sessions import Session

DIM, K, ADDED, SETTLING = 384, 8, 1000, 15
SMALL = 100


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    given = _parser().parse_args(arguments)
    with (
        _place(given) as uri,
        tempfile.TemporaryDirectory(prefix="memlong-bench-", dir=given.folder) as folder,
    ):
        result = measure(uri, folder, given)
    print(json.dumps(result, indent=2))
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=2) + "\n")


def measure(uri: str, folder: str, given: argparse.Namespace) -> dict[str, Any]:
    """Fill a bank, wait until the server has settled, and query it; then again among other sessions' chunks."""
    draws = torch.Generator().manual_seed(0)
    bank = MilvusBank(
        DIM, uri=uri, store=folder, collection="memlong_bench", consistency=given.consistency, timeout=60
    )
    began = time.perf_counter()
    _fill(bank, given.chunks, given.block_kib, draws)
    filled = time.perf_counter() - began
    _settle(bank)
    asked = _vectors(given.queries, draws)
    times = _timed(bank, asked, given.consistency)
    true, found = (
        bank.exact_search(asked, K),
        torch.cat([bank.search(each[None], K).scores for each in asked]),
    )
    result = {
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pymilvus": pymilvus.__version__,
            "server": bank.engine.call("get_server_version"),
        },
        "chunks": given.chunks,
        "block_kib": given.block_kib,
        "queries": given.queries,
        "k": K,
        "consistency": given.consistency,
        "filled_s": filled,
        "client_bytes_per_chunk": bank.resident_bytes / given.chunks,
        "recall_at_8": float((found >= true.scores[:, -1:]).float().mean()),
        "times": _table(times),
        "ratios": _ratios(times),
    }
    if given.crowd:
        result["crowd"] = _crowded(uri, folder, bank, given, draws)
    return result


def _vectors(count: int, draws: torch.Generator) -> torch.Tensor:
    """Vectors around a thousand centres, as embeddings of texts are around their topics; unit length."""
    centres = torch.randn(1000, DIM, generator=torch.Generator().manual_seed(1))
    near = centres[torch.randint(1000, (count,), generator=draws)]
    return torch.nn.functional.normalize(near + 0.7 * torch.randn(count, DIM, generator=draws))


def _fill(bank: MilvusBank, chunks: int, block_kib: int, draws: torch.Generator) -> None:
    block = torch.randn(1, 1, 1, 8, block_kib * 32, generator=draws).half()  # keys are half of a block
    for start in range(0, chunks, ADDED):
        count = min(ADDED, chunks - start)
        keys = block.expand(count, -1, -1, -1, -1)
        spans = torch.arange(start, start + count)[:, None] + torch.tensor([0, 1])
        bank.add(_vectors(count, draws), keys, keys, spans)


def _settle(bank: MilvusBank) -> None:
    """Wait until what was added is no longer young, and a server has built its index."""
    if bank.engine.address.is_local:
        return
    client = bank.engine.client
    client.flush(bank.collection, timeout=300)
    client.load_collection(bank.collection, timeout=300)
    time.sleep(SETTLING)


def _timed(bank: MilvusBank, asked: torch.Tensor, consistency: str) -> dict[str, list[float]]:
    """Return the milliseconds of each query in each way."""
    raw, store = _raw_search(bank, consistency), Path(bank.state.store.folder.place)  # type: ignore[attr-defined]
    ways: list[tuple[str, Callable[[torch.Tensor], Any]]] = [
        ("pymilvus search", raw),
        ("bank.search", lambda query: bank.search(query, K)),
        ("pymilvus search + reads", lambda query: _read(bank, store, raw(query))),
        ("bank.retrieve", lambda query: bank.retrieve(query, K)),
    ]
    for query in asked[:50]:
        for _, way in ways:
            way(query[None])
    times: dict[str, list[float]] = {name: [] for name, _ in ways}
    draws = torch.Generator().manual_seed(2)
    for query in asked:
        for place in torch.randperm(len(ways), generator=draws).tolist():
            name, way = ways[place]
            began = time.perf_counter()
            way(query[None])
            times[name].append(1e3 * (time.perf_counter() - began))
    return times


def _raw_search(bank: MilvusBank, consistency: str) -> Callable[[torch.Tensor], Any]:
    rows, client = bank.rows, bank.engine.client

    def search(query: torch.Tensor) -> Any:
        return client.search(
            bank.collection,
            data=list(query.numpy()),
            anns_field="embedding",
            filter=rows.filter,
            limit=K,
            output_fields=["pk"],
            search_params={"metric_type": "IP", "params": {"ef": 64}},
            consistency_level=consistency.capitalize(),
            partition_names=[rows.partition],
            timeout=60,
        )

    return search


def _read(bank: MilvusBank, store: Path, found: Any) -> torch.Tensor:
    folder = store / bank.state.store.folder.name  # type: ignore[attr-defined]
    ids = bank.rows.session.ids_of(found[0].ids)
    blocks = [np.frombuffer((folder / f"{each}.kv").read_bytes(), dtype=np.uint8) for each in ids]
    return torch.from_numpy(np.concatenate(blocks))


def _crowded(
    uri: str, folder: str, bank: MilvusBank, given: argparse.Namespace, draws: torch.Generator
) -> dict[str, Any]:
    """Ask a small session among many of its size."""
    spans = np.stack([np.arange(SMALL), np.arange(SMALL) + 1], axis=1)
    for number in range(given.crowd):
        rows = SessionRows(bank.engine, bank.rows.collection, Session.of(f"crowd {number}"))
        rows.upsert(np.arange(SMALL), _vectors(SMALL, draws).numpy(), spans)
    small = MilvusBank(
        DIM, uri=uri, store=folder, collection="memlong_bench", consistency=given.consistency, timeout=60
    )
    _fill(small, SMALL, given.block_kib, draws)
    _settle(small)
    times = _timed(small, _vectors(given.queries, draws), given.consistency)
    return {
        "sessions": given.crowd,
        "chunks_each": SMALL,
        "partitions": bank.rows.collection.partitions,
        "times": _table(times),
        "ratios": _ratios(times),
    }


def _table(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {
        name: {"p50_ms": float(np.percentile(each, 50)), "p99_ms": float(np.percentile(each, 99))}
        for name, each in times.items()
    }


def _ratios(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    table = _table(times)
    pairs = {
        "search": ("bank.search", "pymilvus search"),
        "retrieve": ("bank.retrieve", "pymilvus search + reads"),
    }
    return {
        name: {each: table[ours][f"{each}_ms"] / table[theirs][f"{each}_ms"] for each in ("p50", "p99")}
        for name, (ours, theirs) in pairs.items()
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


@contextmanager
def _place(given: argparse.Namespace) -> Iterator[str]:
    if not given.start:
        yield given.uri
        return
    sys.path.insert(0, str(Path(__file__).parent / "tests"))
    from milvus_server import Server

    with tempfile.TemporaryDirectory(prefix="memlong-milvus-server-", dir=given.folder) as folder:
        server = Server(Path(folder))
        try:
            server.start()
            yield server.uri
        finally:
            server.stop()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--uri", help="of a Milvus, or a file that ends in .db")
    place.add_argument("--start", action="store_true", help="start a server for this")
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--block-kib", type=int, default=128, help="keys and values of a chunk")
    parser.add_argument("--queries", type=int, default=3000)
    parser.add_argument("--consistency", default="bounded")
    parser.add_argument("--crowd", type=int, default=1000, help=f"other sessions, of {SMALL} chunks each")
    parser.add_argument(
        "--folder", help="where the blocks and the server's files go; by default /tmp or the like"
    )
    parser.add_argument("--json", help="file to write to")
    return parser


if __name__ == "__main__":
    main()
