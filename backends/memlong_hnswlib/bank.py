"""HnswlibBank: a bank searched by hnswlib."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import hnswlib
import numpy as np
import torch

from memlong.bank import BankOptions, Floats, Ids, MemoryBank
from memlong.bank.validate import whole_number
from memlong.errors import InvalidArgumentError

_SEED = 100
_MOST_LINKS = 512
_MOST_EFFORT = 2**20
_MOST_CHUNKS = (
    2**20
)  # the graph takes memory for its whole capacity at once, and a snapshot may be a stranger's
_MOST_THREADS = 1024
_SAVED = {"M": 64, "ef_construction": 1024, "ef": 4096, "initial_capacity": 2**17, "build_threads": 64}


class HnswlibBank(MemoryBank):
    """A bank with an HNSW graph (Malkov and Yashunin, arXiv 1603.09320) in hnswlib, on the CPU.

    The graph doubles its capacity when it is full. Removed chunks are only marked in it, and still cost time
    when a search passes through; once a third of the graph is dead it is rebuilt. (hnswlib could put new
    chunks in dead ones' places, but repairing the graph around them took five times as long as rebuilding.)
    Building is seeded and, with one thread, reproducible. A search takes as many threads as torch does
    (`torch.set_num_threads`), where hnswlib by itself would take all cores.

    Parameters
    ----------
    dim : int
        Width of the embeddings.
    M : int, default 16
        Links of each chunk; more raise recall, memory and building time. From 2 to 512.
    ef_construction : int, default 200
        Effort of building.
    ef : int, default 64
        Effort of searching; a search never uses less than k.
    initial_capacity : int, default 1024
        How many chunks the graph has room for at first; at most 2**20.
    build_threads : int, default 1
        Threads that add chunks; with more, graphs differ from run to run.
    **bank_options
        The options of `MemoryBank`.

    Raises
    ------
    InvalidArgumentError
        If an option has a value that cannot be used.
    DeviceUnavailableError
        If the device is not the CPU.
    """

    saved_options = _SAVED

    _graph: Any

    def __init__(
        self,
        dim: int,
        *,
        M: int = 16,  # noqa: N803 -- the paper's and the library's name
        ef_construction: int = 200,
        ef: int = 64,
        initial_capacity: int = 1024,
        build_threads: int = 1,
        **bank_options: Unpack[BankOptions],
    ) -> None:
        super().__init__(dim, **bank_options)
        self._links = whole_number("M", M, at_least=2, at_most=_MOST_LINKS)
        self._ef_construction = whole_number(
            "ef_construction", ef_construction, at_least=1, at_most=_MOST_EFFORT
        )
        self._ef = whole_number("ef", ef, at_least=1, at_most=_MOST_EFFORT)
        self._initial_capacity = whole_number(
            "initial_capacity", initial_capacity, at_least=1, at_most=_MOST_CHUNKS
        )
        self._build_threads = whole_number("build_threads", build_threads, at_least=1, at_most=_MOST_THREADS)
        self._index_reset()

    def _index_options(self) -> dict[str, Any]:
        return {
            "M": self._links,
            "ef_construction": self._ef_construction,
            "ef": self._ef,
            "initial_capacity": self._initial_capacity,
            "build_threads": self._build_threads,
        }

    def _index_save(self) -> tuple[Mapping[str, Any], bytes] | None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "graph")
            self._graph.save_index(str(path))
            content = path.read_bytes()
        if len(content) != self._graph.index_file_size():  # hnswlib itself does not notice a full disk
            raise OSError(
                f"hnswlib wrote {len(content):,} bytes of its index into {tempfile.gettempdir()!r} instead of "
                f"{self._graph.index_file_size():,}; is that disk full? TMPDIR names another"
            )
        return {"library": _version(), "dead": self._dead}, content

    def _index_load(self, facts: Mapping[str, Any], content: bytes) -> None:
        if facts["library"] != _version():
            raise ValueError(f"it is of hnswlib {facts['library']}, and this is {_version()}")
        loaded: Any = hnswlib.Index("l2" if self._similarity == "l2" else "ip", self.dim)
        with tempfile.TemporaryDirectory() as folder:  # nobody else's, so what was checked is what is read
            path = Path(folder, "graph")
            path.write_bytes(content)
            loaded.load_index(str(path), max_elements=self._initial_capacity)
        dead = int(facts["dead"])
        labels = np.array(loaded.get_ids_list(), dtype=np.int64)
        if len(labels) - dead != len(self._table) or not np.isin(self._table.ids, labels).all():
            raise ValueError("it is the graph of other chunks")
        loaded.set_ef(self._ef)
        self._graph, self._dead = loaded, dead

    def _index_add(self, ids: Ids, embeddings: Floats) -> None:
        wanted = self._graph.element_count + len(ids)
        if wanted > self._graph.max_elements:
            self._graph.resize_index(max(wanted, 2 * self._graph.max_elements))
        self._graph.add_items(embeddings, ids, num_threads=self._build_threads)

    def _index_search(self, queries: Floats, k: int) -> Ids:
        found = self._nearest(queries, k)
        if found is not None:
            return found
        one_by_one = (self._nearest(query[None], k) for query in queries)
        nothing = np.full((1, k), -1, dtype=np.int64)
        return np.concatenate([nothing if each is None else each for each in one_by_one])

    def _index_remove(self, ids: Ids) -> None:
        for chunk_id in ids.tolist():
            self._graph.mark_deleted(chunk_id)
        self._dead += len(ids)
        if 3 * self._dead > self._graph.element_count:
            self._drop_index()

    def _index_reset(self) -> None:
        space = "l2" if self._similarity == "l2" else "ip"
        self._graph = hnswlib.Index(space, self.dim)
        try:
            self._graph.init_index(
                self._initial_capacity,
                M=self._links,
                ef_construction=self._ef_construction,
                random_seed=_SEED,
            )
        except (RuntimeError, MemoryError) as error:
            raise InvalidArgumentError(
                f"hnswlib has no memory for a graph of initial_capacity {self._initial_capacity} and M {self._links}: "
                f"{error}. Use smaller ones; the graph grows as it fills."
            ) from error
        self._graph.set_ef(self._ef)
        self._dead = 0

    def _nearest(self, queries: Floats, k: int) -> Ids | None:
        """Return ids [q, k], or None where hnswlib came by fewer than k for one of the queries."""
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
