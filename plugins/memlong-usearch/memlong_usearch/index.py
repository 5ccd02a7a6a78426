"""UsearchIndex: an HNSW graph in usearch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from usearch.index import BatchMatches
from usearch.index import Index as Graph

from memlong.bank import Floats, Ids, Index
from memlong.settings import documented, setting


@documented
@dataclass(frozen=True)
class UsearchOptions:
    """The options of a `UsearchIndex`."""

    connectivity: int = setting(
        16,
        "Links per chunk; more links raise recall, memory use and build time.",
        least=2,
        most=512,
        most_of_strangers=64,
    )
    expansion_add: int = setting(
        128, "Candidate list size while building.", least=1, most=2**20, most_of_strangers=1024
    )
    expansion_search: int = setting(
        64,
        "Candidate list size while searching; at least k is used.",
        least=1,
        most=2**20,
        most_of_strangers=4096,
    )


class UsearchIndex(Index[UsearchOptions]):
    """An HNSW graph (Malkov and Yashunin, arXiv 1603.09320) in usearch, on the CPU.

    The graph grows as it fills, and new chunks reuse the slots of removed ones. Building is reproducible. This
    class adapts usearch's conventions to memlong's: it returns distances, which the bank does not need; ids are
    uint64; and if it finds fewer than k, only its counts say so, and the remaining ids are 0.
    """

    options_class = UsearchOptions

    # Required: every index has these four methods.

    def reset(self) -> None:
        """Create an empty graph."""
        self._graph = self._empty_graph()

    def add(self, ids: Ids, embeddings: Floats) -> None:
        """Add to the graph."""
        self._graph.add(ids.astype(np.uint64), embeddings, threads=1)

    def search(self, queries: Floats, k: int) -> Ids:
        """Search the graph."""
        found = self._graph.search(queries, k, threads=1)
        if not isinstance(found, BatchMatches):  # a single query, without padding
            return found.keys[None].astype(np.int64)
        ids: Ids = found.keys.astype(np.int64)
        ids[np.arange(k) >= found.counts[:, None]] = -1
        return ids

    def remove(self, ids: Ids) -> bool:
        """Remove from the graph, freeing the slots."""
        self._graph.remove(ids.astype(np.uint64))
        return True

    # Optional: with these two, snapshots include the graph.

    def dump(self) -> tuple[Mapping[str, Any], bytes] | None:
        """Serialize the graph with usearch."""
        content = self._graph.save()
        return None if content is None else ({"library": _version()}, bytes(content))

    def load(self, facts: Mapping[str, Any], content: bytes) -> None:
        """Deserialize a graph."""
        if facts["library"] != _version():
            raise ValueError(f"it was saved by usearch {facts['library']}, and this is {_version()}")
        graph = self._empty_graph()
        graph.load(content)
        if graph.ndim != self.rows.dim or not np.array_equal(np.sort(graph.keys[:]), self.rows.ids):
            raise ValueError("it indexes other chunks")
        self._graph = graph

    def _empty_graph(self) -> Graph:
        return Graph(
            ndim=self.rows.dim,
            metric="l2sq" if self.rows.similarity == "l2" else "ip",
            dtype="f32",
            connectivity=self.options.connectivity,
            expansion_add=self.options.expansion_add,
            expansion_search=self.options.expansion_search,
        )


def _version() -> str:
    return importlib.metadata.version("usearch")
