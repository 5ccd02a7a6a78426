"""How much a bank adds to Milvus: its searches and retrievals beside pymilvus and plain reads, in turns, in one run.

python bench.py --uri http://127.0.0.1:19530      a server of yours
python bench.py --start                           the one of ``pip install 'milvus==2.3.5'``, started for this
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memlong_milvus.bank import MilvusBank
from memlong_milvus.block import decode

DIM, K, BLOCK = 384, 8, (1, 1, 8, 32)


def main() -> None:
    """Measure and print."""
    given = _parser().parse_args()
    with _place(given) as uri, tempfile.TemporaryDirectory(prefix="memlong-bench-") as folder:
        result = measure(uri, folder, given.chunks, given.queries, given.consistency)
    print(json.dumps(result, indent=2))
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=2))


def measure(uri: str, folder: str, chunks: int, queries: int, consistency: str) -> dict[str, Any]:
    """Fill a bank, wait until it is settled, and time four ways to ask, one query at a time, in turns."""
    bank = MilvusBank(
        DIM, uri=uri, store=folder, collection="memlong_bench", consistency=consistency, timeout=60
    )
    draws = torch.Generator().manual_seed(0)
    centres = torch.randn(1000, DIM, generator=draws)
    began = time.perf_counter()
    for start in range(0, chunks, 1000):
        count = min(1000, chunks - start)
        near = centres[torch.randint(1000, (count,), generator=draws)]
        vectors = near + 0.7 * torch.randn(count, DIM, generator=draws)
        keys = torch.randn(count, *BLOCK, generator=draws).half()
        spans = torch.stack(
            [torch.arange(start, start + count), torch.arange(start, start + count) + 1], dim=1
        )
        bank.add(vectors, keys, keys, spans)
    filled = time.perf_counter() - began
    client, collection = bank._engine._client, bank.collection  # noqa: SLF001 - beside what it uses
    if not bank._engine.address.is_local:  # noqa: SLF001
        client.flush(collection, timeout=120)
        client.load_collection(collection, timeout=120)
    time.sleep(15)  # what was added is no longer young, and the server has built its index
    asked = centres[torch.randint(1000, (queries,), generator=draws)] + 0.7 * torch.randn(
        queries, DIM, generator=draws
    )
    asked = torch.nn.functional.normalize(asked)
    raw = _raw_search(bank, client, collection, consistency)
    ways: dict[str, Callable[[torch.Tensor], Any]] = {
        "pymilvus search": raw,
        "bank.search": lambda query: bank.search(query, K),
        "pymilvus search + reads": lambda query: _raw_reads(bank, raw(query)),
        "bank.retrieve": lambda query: bank.retrieve(query, K),
    }
    for query in asked[:50]:
        for way in ways.values():
            way(query[None])
    times: dict[str, list[float]] = {name: [] for name in ways}
    for query in asked:
        for name, way in ways.items():
            began = time.perf_counter()
            way(query[None])
            times[name].append(1e3 * (time.perf_counter() - began))
    true = bank.exact_search(asked, K)
    found = torch.cat([bank.search(query[None], K).scores for query in asked])
    tables = {
        name: {"p50_ms": float(np.percentile(each, 50)), "p99_ms": float(np.percentile(each, 99))}
        for name, each in times.items()
    }
    return {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "chunks": chunks,
        "queries": queries,
        "consistency": consistency,
        "filled_s": filled,
        "recall_at_8": float((found >= true.scores[:, -1:]).float().mean()),
        "times": tables,
        "ratios": {
            "search": _ratios(tables, "bank.search", "pymilvus search"),
            "retrieve": _ratios(tables, "bank.retrieve", "pymilvus search + reads"),
        },
    }


def _ratios(tables: dict[str, dict[str, float]], ours: str, theirs: str) -> dict[str, float]:
    return {name: tables[ours][f"{name}_ms"] / tables[theirs][f"{name}_ms"] for name in ("p50", "p99")}


def _raw_search(bank: MilvusBank, client: Any, collection: str, consistency: str) -> Callable[..., Any]:
    rows = bank._rows  # noqa: SLF001

    def search(query: torch.Tensor) -> Any:
        return client.search(
            collection,
            data=list(query.numpy()),
            anns_field="embedding",
            filter=rows._filter,  # noqa: SLF001
            limit=K,
            output_fields=["pk"],
            search_params={"metric_type": "IP", "params": {"ef": 64}},
            consistency_level=consistency.capitalize(),
            partition_names=[rows._partition],  # noqa: SLF001
            timeout=60,
        )

    return search


def _raw_reads(bank: MilvusBank, found: Any) -> torch.Tensor:
    """Read, check and stack the objects of hits, one after the other."""
    store: Any = bank._store  # noqa: SLF001
    blocks = []
    for chunk_id in bank._session.ids_of(found[0].ids):  # noqa: SLF001
        content = Path(store.place, store._folder.block(chunk_id)).read_bytes()  # noqa: SLF001
        blocks.append(np.concatenate(decode(content, store._folder.session.key, chunk_id, store._layout)))  # noqa: SLF001
    return torch.from_numpy(np.stack(blocks))


@contextmanager
def _place(given: argparse.Namespace) -> Iterator[str]:
    if not given.start:
        yield given.uri
        return
    sys.path.insert(0, str(Path(__file__).parent / "tests"))
    from server import Server

    with tempfile.TemporaryDirectory(prefix="memlong-milvus-server-") as folder:
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
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--consistency", default="bounded")
    parser.add_argument("--json", help="file to write to")
    return parser


if __name__ == "__main__":
    main()
