"""UsearchBank: a bank searched by usearch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
from usearch.index import BatchMatches, Index

from memlong.bank import BankOptions, Floats, Ids, MemoryBank, whole_number

# Options may come from a stranger's snapshot, and a graph of a million links a chunk takes gigabytes when empty.
_MOST_LINKS = 512
_MOST_EFFORT = 2**20
_SAVED = {"connectivity": 64, "expansion_add": 1024, "expansion_search": 4096}


class UsearchBank(MemoryBank):
    """A bank with an HNSW graph (Malkov and Yashunin, arXiv 1603.09320) in usearch, on the CPU.

    The graph grows as it fills, and new chunks take the places of those that have left. Building is
    reproducible. What usearch does otherwise than memlong ends here: it returns distances, which the base
    does not need; ids are uint64; and where it finds fewer than k, it says so in counts and leaves id 0.

    Parameters
    ----------
    dim : int
        Width of the embeddings.
    connectivity : int, default 16
        Links of each chunk; more raise recall, memory and building time. From 2 to 512.
    expansion_add : int, default 128
        Effort of building.
    expansion_search : int, default 64
        Effort of searching; a search never uses less than k.
    **bank_options
        The options of `MemoryBank`.

    Raises
    ------
    InvalidArgumentError
        If an option has a value that cannot be used.
    DeviceUnavailableError
        If the device is not the CPU.
    """

    saved_options = _SAVED  # which a file may choose, and the most that it may ask for

    def __init__(
        self,
        dim: int,
        *,
        connectivity: int = 16,
        expansion_add: int = 128,
        expansion_search: int = 64,
        **bank_options: Unpack[BankOptions],
    ) -> None:
        super().__init__(dim, **bank_options)
        self._connectivity = whole_number("connectivity", connectivity, at_least=2, at_most=_MOST_LINKS)
        self._expansion_add = whole_number("expansion_add", expansion_add, at_least=1, at_most=_MOST_EFFORT)
        self._expansion_search = whole_number(
            "expansion_search", expansion_search, at_least=1, at_most=_MOST_EFFORT
        )
        self._index_reset()

    # The four methods that every backend has.

    def _index_reset(self) -> None:
        self._graph = self._empty_graph()

    def _index_add(self, ids: Ids, embeddings: Floats) -> None:
        self._graph.add(ids.astype(np.uint64), embeddings, threads=1)

    def _index_search(self, queries: Floats, k: int) -> Ids:
        found = self._graph.search(queries, k, threads=1)
        if not isinstance(found, BatchMatches):  # of one query: as many as there are
            return found.keys[None].astype(np.int64)
        ids: Ids = found.keys.astype(np.int64)
        ids[np.arange(k) >= found.counts[:, None]] = -1
        return ids

    def _index_remove(self, ids: Ids) -> None:
        self._graph.remove(ids.astype(np.uint64))

    # What a backend may have besides: with these, a snapshot keeps the options, and the graph itself.

    def _index_options(self) -> dict[str, Any]:
        return {
            "connectivity": self._connectivity,
            "expansion_add": self._expansion_add,
            "expansion_search": self._expansion_search,
        }

    def _index_save(self) -> tuple[Mapping[str, Any], bytes] | None:
        content = self._graph.save()
        return None if content is None else ({"library": _version()}, bytes(content))

    def _index_load(self, facts: Mapping[str, Any], content: bytes) -> None:
        if facts["library"] != _version():
            raise ValueError(f"it is of usearch {facts['library']}, and this is {_version()}")
        graph = self._empty_graph()
        graph.load(content)
        if graph.ndim != self.dim or not np.array_equal(np.sort(graph.keys[:]), self._table.ids):
            raise ValueError("it is the graph of other chunks")
        self._graph = graph

    def _empty_graph(self) -> Index:
        return Index(
            ndim=self.dim,
            metric="l2sq" if self._similarity == "l2" else "ip",
            dtype="f32",
            connectivity=self._connectivity,
            expansion_add=self._expansion_add,
            expansion_search=self._expansion_search,
        )


def _version() -> str:
    return importlib.metadata.version("usearch")
