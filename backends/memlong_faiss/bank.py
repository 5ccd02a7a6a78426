"""FaissBank: a bank searched by FAISS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import faiss
import numpy as np
import torch

from memlong.bank import BankOptions, Floats, Ids, MemoryBank
from memlong.bank.validate import whole_number
from memlong.errors import DeviceUnavailableError
from memlong_faiss.gpu import GpuResources, gpu_resources, require_gpu, warn_if_two_owners
from memlong_faiss.numbering import RowNumbers
from memlong_faiss.recipe import MOST_EFFORT, Recipe, core_of, is_lossy, training_points
from memlong_faiss.rows import CpuRows, GpuRows, RowIndex, one_thread_after_fork

_TIE_MARGIN = 16
_MOST_THREADS = 1024
_MOST_RUNS = 400_000  # of ids, which nearly fill the largest manifest that is read
_SAVED = {
    "index": None,
    "ef_construction": 1024,
    "ef_search": 4096,
    "nprobe": 4096,
    "train_size": None,
    "refine": 256,
    "build_threads": 64,
}


class FaissBank(MemoryBank):
    """A bank with a FAISS index of any kind that an index-factory string describes.

    "Flat" searches the bank's own embeddings in place. Other kinds keep a native index beside them, which is
    rebuilt from them once a fifth of its rows is dead, as FAISS's graphs cannot delete. Building is seeded
    and, with one thread, reproducible.

    An index that has to be trained (IVF, PQ, SQ) is trained on the bank's own embeddings as soon as there are
    `train_size` of them, and anew whenever it is rebuilt. **Until then searches are exact**, by brute force
    over the embeddings; `is_trained` tells which it is.

    Parameters
    ----------
    dim : int
        Width of the embeddings.
    index : str, default "Flat"
        FAISS's index-factory string: "Flat", "HNSW32", "IVF256,Flat", "IVF256,PQ48", "SQ8".
    ef_construction, ef_search : int, default 200 and 64
        Effort of building and of searching an HNSW graph; a search never uses less than k.
    nprobe : int, default 16
        How many lists a search of an IVF index visits.
    train_size : int, optional
        How many embeddings to wait for before training, by default 39 for each centroid to learn (FAISS's
        own advice): 9,984 for "IVF256,Flat" and for any 8-bit PQ, and no fewer than `dim`.
    refine : int, default 4
        How many candidates a compressed index (PQ, SQ, PCA) names for each chunk wanted, for exact scoring.
    build_threads : int, default 1
        Threads that build an HNSW graph; with more, graphs differ from run to run.
    **bank_options
        The options of `MemoryBank`. ``device="cuda"`` takes FAISS-GPU and a Flat or IVF index; k is then at
        most 2,048.

    Raises
    ------
    InvalidArgumentError
        If an option has a value that cannot be used; for a bad `index`, with FAISS's reason.
    DeviceUnavailableError
        If FAISS cannot use the device, or the index cannot.
    """

    devices = ("cpu", "cuda")
    saved_options = _SAVED

    _rows: RowIndex | None
    _numbers: RowNumbers
    _gpu: GpuResources | None = None

    def __init__(
        self,
        dim: int,
        *,
        index: str = "Flat",
        ef_construction: int = 200,
        ef_search: int = 64,
        nprobe: int = 16,
        train_size: int | None = None,
        refine: int = 4,
        build_threads: int = 1,
        **bank_options: Unpack[BankOptions],
    ) -> None:
        super().__init__(dim, **bank_options)
        warn_if_two_owners()
        self._recipe = Recipe(dim, index, self._similarity, ef_construction, ef_search, nprobe)
        self._refine = whole_number("refine", refine, at_least=1, at_most=MOST_EFFORT)
        self._build_threads = whole_number("build_threads", build_threads, at_least=1, at_most=_MOST_THREADS)
        self._given_train_size = train_size
        sample = self._recipe.build()
        self._train_size = training_points(sample, train_size)
        self._is_lossy = is_lossy(sample)
        on_cpu = self.device.type == "cpu"
        self._in_place = on_cpu and isinstance(sample, faiss.IndexFlat)
        if not on_cpu and not isinstance(core_of(sample), (faiss.IndexFlat, faiss.IndexIVF)):
            raise DeviceUnavailableError(
                f"index {index!r} cannot compute on {self.device}: FAISS has Flat and IVF indexes for GPUs; "
                "use one of these, or device='cpu'"
            )
        self._index_reset()

    @property
    def is_trained(self) -> bool:
        """Whether the native index searches; until it does, searches are exact."""
        return self._in_place or self._rows is not None

    def _usable_device(self, device: str | torch.device | None) -> torch.device:
        chosen = super()._usable_device(device)
        if chosen.type == "cuda":
            require_gpu(chosen)
        return chosen

    def _index_add(self, ids: Ids, embeddings: Floats) -> None:
        if self._in_place or (self._rows is None and len(self._table) < self._train_size):
            return
        if self._rows is None:
            self._rows = self._trained_rows(self._table.embeddings)
            ids, embeddings = self._table.ids, self._table.embeddings
        self._rows.add(embeddings)
        self._numbers.append(ids)

    def _index_search(self, queries: Floats, k: int) -> Ids:
        if self._rows is None:
            table = self._table
            fetch = min(k + _TIE_MARGIN, len(table))
            rows = faiss.knn(queries, table.embeddings, fetch, metric=self._recipe.metric)[1]
            return np.where(rows < 0, -1, table.ids[rows])
        numbers = self._numbers
        fetch = min(k * self._refine, len(numbers)) if self._is_lossy else k
        rows = self._rows.search(queries, fetch, numbers)
        return np.where(rows < 0, -1, numbers.ids[rows])

    def _index_remove(self, ids: Ids) -> None:
        if self._rows is None:
            return
        numbers = self._numbers
        numbers.bury(ids)
        if 5 * numbers.dead > len(numbers) or numbers.dead > self._rows.most_dead:
            self._drop_index()

    def after_fork(self) -> None:
        """Compute with one thread, as FAISS, too, would wait for its parent's for ever."""
        super().after_fork()
        one_thread_after_fork()

    def _index_reset(self) -> None:
        self._rows = None
        self._numbers = RowNumbers(np.empty(0, dtype=np.int64), np.empty(0, dtype=bool))

    def _index_options(self) -> dict[str, Any]:
        recipe = self._recipe
        return {
            "index": recipe.factory,
            "ef_construction": recipe.ef_construction,
            "ef_search": recipe.ef_search,
            "nprobe": recipe.nprobe,
            "train_size": self._given_train_size,
            "refine": self._refine,
            "build_threads": self._build_threads,
        }

    def _index_save(self) -> tuple[Mapping[str, Any], bytes] | None:
        if not isinstance(self._rows, CpuRows):
            return None
        row_ids = self._numbers.ids
        ends = np.flatnonzero(np.diff(row_ids) != 1) + 1
        if len(ends) >= _MOST_RUNS:  # then it is built anew when it is loaded
            return None
        runs = [[int(run[0]), int(run[-1]) + 1] for run in np.split(row_ids, ends)]
        return {"library": faiss.__version__, "row_ids": runs}, self._rows.to_bytes()

    def _index_load(self, facts: Mapping[str, Any], content: bytes) -> None:
        if facts["library"] != faiss.__version__:
            raise ValueError(f"it is of FAISS {facts['library']}, and this is {faiss.__version__}")
        if self.device.type != "cpu":
            raise ValueError("it is an index of the CPU")
        row_ids = _row_ids(facts["row_ids"], 2 * len(self._table))  # far fewer are dead before it is rebuilt
        alive = np.isin(row_ids, self._table.ids)
        if int(alive.sum()) != len(self._table):
            raise ValueError("it is the index of other chunks")
        self._rows = CpuRows.from_bytes(content, self._recipe, self._build_threads, len(row_ids))
        self._numbers = RowNumbers(row_ids, alive)

    def _trained_rows(self, embeddings: Floats) -> RowIndex:
        index = self._recipe.build()
        self._recipe.train(index, embeddings)
        if self.device.type == "cuda":
            self._gpu = gpu_resources(self.device.index or 0)  # held, so that a rebuilt index takes the same
            return GpuRows(index, self._recipe, self._gpu)
        return CpuRows(index, self._recipe, self._build_threads)


def _row_ids(runs: Any, most: int) -> Ids:
    """Return the ids of runs [start, end), at most so many, and ascending."""
    last = 0
    for start, end in runs:
        if type(start) is not int or type(end) is not int or not last <= start < end <= 2**62:
            raise ValueError(f"its runs of ids do not ascend: {start!r} to {end!r}")
        last = end
        most -= end - start
        if most < 0:
            raise ValueError("it is the index of more chunks")
    return np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(start, end) for start, end in runs)])
