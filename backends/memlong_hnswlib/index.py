"""HnswlibIndex: an HNSW graph in hnswlib."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
import torch

from memlong.bank import Floats, Ids, Index
from memlong.errors import InvalidArgumentError
from memlong.settings import documented, setting

_SEED = 100


@documented
@dataclass(frozen=True)
class HnswlibOptions:
    """The options of an `HnswlibIndex`."""

    M: int = setting(
        16,
        "Links per chunk; more links raise recall, memory use and build time.",
        least=2,
        most=512,
        most_of_strangers=64,
    )
    ef_construction: int = setting(
        200, "Candidate list size while building.", least=1, most=2**20, most_of_strangers=1024
    )
    ef: int = setting(
        64,
        "Candidate list size while searching; at least k is used.",
        least=1,
        most=2**20,
        most_of_strangers=4096,
    )
    initial_capacity: int = setting(
        1024,
        "Initial capacity of the graph, in chunks.",
        more="Memory for all of them is allocated at once.",
        least=1,
        most=2**20,
        most_of_strangers=2**17,
    )
    build_threads: int = setting(
        1,
        "Threads for adding chunks; with more than one, building is not reproducible.",
        least=1,
        most=1024,
        most_of_strangers=64,
    )


class HnswlibIndex(Index[HnswlibOptions]):
    """An HNSW graph (Malkov and Yashunin, arXiv 1603.09320) in hnswlib, on the CPU.

    The graph doubles its capacity when full. Removed chunks are only marked as deleted and still cost search
    time, so the graph is rebuilt once a third of it is dead. (hnswlib can reuse the slots of deleted chunks, but
    repairing the graph around them took five times as long as rebuilding.) Building is seeded and, with one
    thread, reproducible. Searches use as many threads as torch (`torch.set_num_threads`), whereas hnswlib's
    default is all cores.
    """

    options_class = HnswlibOptions

    _graph: Any
    _dead: int

    def dump(self) -> tuple[Mapping[str, Any], bytes] | None:
        """Serialize the graph with hnswlib."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "graph")
            self._graph.save_index(str(path))
            content = path.read_bytes()
        if len(content) != self._graph.index_file_size():  # hnswlib does not notice a full disk
            raise OSError(
                f"hnswlib wrote only {len(content):,} of {self._graph.index_file_size():,} bytes of its index to "
                f"{tempfile.gettempdir()!r}: free space on that disk, or set TMPDIR to another"
            )
        return {"library": _version(), "dead": self._dead}, content

    def load(self, facts: Mapping[str, Any], content: bytes) -> None:
        """Deserialize a graph."""
        if facts["library"] != _version():
            raise ValueError(f"it was saved by hnswlib {facts['library']}, and this is {_version()}")
        loaded = self._new_graph()
        with tempfile.TemporaryDirectory() as folder:  # private, so the verified bytes are what hnswlib reads
            path = Path(folder, "graph")
            path.write_bytes(content)
            loaded.load_index(str(path), max_elements=self.options.initial_capacity)
        dead = int(facts["dead"])
        labels = np.array(loaded.get_ids_list(), dtype=np.int64)
        if len(labels) - dead != len(self.rows) or not np.isin(self.rows.ids, labels).all():
            raise ValueError("it indexes other chunks")
        loaded.set_ef(self.options.ef)
        self._graph, self._dead = loaded, dead

    def add(self, ids: Ids, embeddings: Floats) -> None:
        """Add to the graph, doubling its capacity if it is full."""
        wanted = self._graph.element_count + len(ids)
        if wanted > self._graph.max_elements:
            self._graph.resize_index(max(wanted, 2 * self._graph.max_elements))
        self._graph.add_items(embeddings, ids, num_threads=self.options.build_threads)

    def search(self, queries: Floats, k: int) -> Ids:
        """Search the graph, one query at a time if it finds fewer than k for any of them."""
        found = self._nearest(queries, k)
        if found is not None:
            return found
        one_by_one = (self._nearest(query[None], k) for query in queries)
        nothing = np.full((1, k), -1, dtype=np.int64)
        return np.concatenate([nothing if each is None else each for each in one_by_one])

    def remove(self, ids: Ids) -> bool:
        """Mark chunks as deleted; request a rebuild once a third of the graph is dead."""
        for chunk_id in ids.tolist():
            self._graph.mark_deleted(chunk_id)
        self._dead += len(ids)
        return 3 * self._dead <= int(self._graph.element_count)

    def reset(self) -> None:
        """Create an empty graph."""
        options = self.options
        self._graph = self._new_graph()
        try:
            self._graph.init_index(
                options.initial_capacity,
                M=options.M,
                ef_construction=options.ef_construction,
                random_seed=_SEED,
            )
        except (RuntimeError, MemoryError) as error:
            raise InvalidArgumentError(
                f"hnswlib cannot allocate a graph with initial_capacity {options.initial_capacity} and M {options.M}: "
                f"{error}. Use smaller values; the graph grows as it fills"
            ) from error
        self._graph.set_ef(options.ef)
        self._dead = 0

    def _new_graph(self) -> Any:
        return hnswlib.Index("l2" if self.rows.similarity == "l2" else "ip", self.rows.dim)

    def _nearest(self, queries: Floats, k: int) -> Ids | None:
        """Return ids [q, k], or None if hnswlib found fewer than k for one of the queries."""
        try:
            labels, _ = self._graph.knn_query(queries, k, num_threads=torch.get_num_threads())
        except RuntimeError as error:
            if "contiguous 2D array" not in str(error):
                raise
            return None
        ids: Ids = labels.view(np.int64)
        return ids


def _version() -> str:
    return importlib.metadata.version("hnswlib")
