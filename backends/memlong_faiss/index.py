"""FaissIndex: any FAISS index that an index-factory string describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import faiss
import numpy as np
import torch

from memlong.bank import Floats, Ids, Index, IndexRows
from memlong.errors import DeviceUnavailableError
from memlong.settings import documented, setting
from memlong_faiss.gpu import GpuResources, gpu_resources, require_gpu, warn_if_two_owners
from memlong_faiss.numbering import RowNumbers
from memlong_faiss.recipe import MOST_EFFORT, Recipe, core_of, is_lossy, training_points
from memlong_faiss.rows import CpuRows, GpuRows, RowIndex, one_thread_after_fork

_TIE_MARGIN = 16
_MOST_RUNS = 400_000  # of ids; these nearly fill a manifest of the maximum size


@documented
@dataclass(frozen=True)
class FaissOptions:
    """The options of a `FaissIndex`."""

    index: str = setting(
        "Flat", "FAISS's index-factory string: 'Flat', 'HNSW32', 'IVF256,Flat', 'IVF256,PQ48', 'SQ8'."
    )
    ef_construction: int = setting(
        200, "FAISS's efConstruction for HNSW graphs.", least=1, most=MOST_EFFORT, most_of_strangers=1024
    )
    ef_search: int = setting(
        64,
        "FAISS's efSearch for HNSW graphs; at least k is used.",
        least=1,
        most=MOST_EFFORT,
        most_of_strangers=4096,
    )
    nprobe: int = setting(
        16,
        "Number of lists that an IVF index searches.",
        least=1,
        most=MOST_EFFORT,
        most_of_strangers=4096,
    )
    train_size: int | None = setting(
        None,
        "Number of embeddings to collect before training.",
        unset="39 per centroid",
        more='That is FAISS\'s recommendation: 9,984 for "IVF256,Flat" and any 8-bit PQ; never fewer than the '
        "dimension of the embeddings.",
        least=1,
        most=2**62,
        most_of_strangers=inf,
    )
    refine: int = setting(
        4,
        "Candidates per requested chunk that a compressed index (PQ, SQ, PCA) returns for exact rescoring.",
        least=1,
        most=MOST_EFFORT,
        most_of_strangers=256,
    )
    build_threads: int = setting(
        1,
        "Threads for building an HNSW graph; with more than one, building is not reproducible.",
        least=1,
        most=1024,
        most_of_strangers=64,
    )


class FaissIndex(Index[FaissOptions]):
    """Any FAISS index that an index-factory string describes.

    "Flat" searches the bank's own embeddings in place. Other kinds keep a separate native index, which is
    rebuilt from them once a fifth of its rows is dead, as FAISS's graphs do not support deletion. Building is
    seeded and, with one thread, reproducible.

    An index that needs training (IVF, PQ, SQ) is trained on the bank's own embeddings as soon as there are
    `train_size` of them, and again whenever it is rebuilt. **Until then, searches are exact**, by brute force
    over the embeddings; see `is_trained`.

    On a GPU (``device="cuda"``) the index must be Flat or IVF, and k at most 2,048.
    """

    devices = ("cpu", "cuda")
    options_class = FaissOptions

    _native: RowIndex | None
    _numbers: RowNumbers
    _gpu: GpuResources | None = None

    def __init__(self, rows: IndexRows, options: FaissOptions) -> None:
        super().__init__(rows, options)
        warn_if_two_owners()
        self._recipe = Recipe(
            rows.dim,
            options.index,
            rows.similarity,
            options.ef_construction,
            options.ef_search,
            options.nprobe,
        )
        sample = self._recipe.build()
        self._train_size = training_points(sample, options.train_size)
        self._is_lossy = is_lossy(sample)
        on_cpu = rows.device.type == "cpu"
        self._in_place = on_cpu and isinstance(sample, faiss.IndexFlat)
        if not on_cpu and not isinstance(core_of(sample), (faiss.IndexFlat, faiss.IndexIVF)):
            raise DeviceUnavailableError(
                f"index must be a Flat or IVF one on {rows.device}, as FAISS has no others for GPUs, got "
                f"{options.index!r}: use one of these, or device='cpu'"
            )

    @property
    def is_trained(self) -> bool:
        """Whether the native index is in use; until then, searches are exact."""
        return self._in_place or self._native is not None

    @classmethod
    def usable_device(cls, device: str | torch.device | None) -> torch.device:
        """Return the requested device, if FAISS can use it."""
        chosen = super().usable_device(device)
        if chosen.type == "cuda":
            require_gpu(chosen)
        return chosen

    def add(self, ids: Ids, embeddings: Floats) -> None:
        """Append to the native index, once it is trained."""
        if self._in_place or (self._native is None and len(self.rows) < self._train_size):
            return
        if self._native is None:
            self._native = self._trained_rows(self.rows.embeddings)
            ids, embeddings = self.rows.ids, self.rows.embeddings
        self._native.add(embeddings)
        self._numbers.append(ids)

    def search(self, queries: Floats, k: int) -> Ids:
        """Search the native index, or by brute force until there is one."""
        if self._native is None:
            table = self.rows
            fetch = min(k + _TIE_MARGIN, len(table))
            rows = faiss.knn(queries, table.embeddings, fetch, metric=self._recipe.metric)[1]
            return np.where(rows < 0, -1, table.ids[rows])
        numbers = self._numbers
        fetch = min(k * self.options.refine, len(numbers)) if self._is_lossy else k
        rows = self._native.search(queries, fetch, numbers)
        return np.where(rows < 0, -1, numbers.ids[rows])

    def remove(self, ids: Ids) -> bool:
        """Mark rows as dead; request a rebuild once a fifth of them are."""
        if self._native is None:
            return True
        numbers = self._numbers
        numbers.bury(ids)
        return 5 * numbers.dead <= len(numbers) and numbers.dead <= self._native.most_dead

    def after_fork(self) -> None:
        """Use one thread, since FAISS's OpenMP would wait forever for its parent's."""
        one_thread_after_fork()

    def reset(self) -> None:
        """Drop the native index."""
        self._native = None
        self._numbers = RowNumbers(np.empty(0, dtype=np.int64), np.empty(0, dtype=bool))

    def dump(self) -> tuple[Mapping[str, Any], bytes] | None:
        """Serialize the native index with FAISS."""
        if not isinstance(self._native, CpuRows):
            return None
        row_ids = self._numbers.ids
        ends = np.flatnonzero(np.diff(row_ids) != 1) + 1
        if len(ends) >= _MOST_RUNS:  # the index is rebuilt on loading instead
            return None
        runs = [[int(run[0]), int(run[-1]) + 1] for run in np.split(row_ids, ends)]
        return {"library": faiss.__version__, "row_ids": runs}, self._native.to_bytes()

    def load(self, facts: Mapping[str, Any], content: bytes) -> None:
        """Deserialize a native index."""
        if facts["library"] != faiss.__version__:
            raise ValueError(f"it was saved by FAISS {facts['library']}, and this is {faiss.__version__}")
        if self.rows.device.type != "cpu":
            raise ValueError("it is a CPU index")
        row_ids = _row_ids(facts["row_ids"], 2 * len(self.rows))  # generous: it is rebuilt at a fifth dead
        alive = np.isin(row_ids, self.rows.ids)
        if int(alive.sum()) != len(self.rows):
            raise ValueError("it indexes other chunks")
        self._native = CpuRows.from_bytes(content, self._recipe, self.options.build_threads, len(row_ids))
        self._numbers = RowNumbers(row_ids, alive)

    def _trained_rows(self, embeddings: Floats) -> RowIndex:
        index = self._recipe.build()
        self._recipe.train(index, embeddings)
        if self.rows.device.type == "cuda":
            self._gpu = gpu_resources(self.rows.device.index or 0)  # kept, so that a rebuilt index reuses it
            return GpuRows(index, self._recipe, self._gpu)
        return CpuRows(index, self._recipe, self.options.build_threads)


def _row_ids(runs: Any, most: int) -> Ids:
    """Expand ascending runs [start, end) to ids, at most ``most`` of them."""
    last = 0
    for start, end in runs:
        if type(start) is not int or type(end) is not int or not last <= start < end <= 2**62:
            raise ValueError(f"its runs of ids are not ascending: {start!r} to {end!r}")
        last = end
        most -= end - start
        if most < 0:
            raise ValueError("it indexes more chunks")
    return np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(start, end) for start, end in runs)])
