"""A native FAISS index of numbered rows, on the CPU or a GPU."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import faiss
import numpy as np

from memlong.bank.arrays import Floats, Ids
from memlong.errors import InvalidArgumentError
from memlong_faiss.gpu import GpuResources
from memlong_faiss.numbering import RowNumbers
from memlong_faiss.recipe import Recipe, core_of


class RowIndex(ABC):
    """A native index whose rows are numbered in insertion order and never removed; searches skip dead ones."""

    most_dead: int
    """Maximum number of dead rows before searches degrade."""

    @abstractmethod
    def add(self, embeddings: Floats) -> None:
        """Append rows."""

    @abstractmethod
    def search(self, queries: Floats, k: int, numbers: RowNumbers) -> Ids:
        """Return int64 [q, c] row numbers, c >= k if there are that many rows; -1 means no row."""


class CpuRows(RowIndex):
    """An index on the CPU, where FAISS itself skips dead rows.

    Parameters
    ----------
    index : faiss.Index
        Trained and empty.
    recipe : Recipe
        Its parameters.
    build_threads : int
        Threads for building an HNSW graph.
    """

    def __init__(self, index: Any, recipe: Recipe, build_threads: int) -> None:
        self._index, self._core = index, core_of(index)
        self._recipe = recipe
        self._build_threads = build_threads
        self.most_dead = int(np.iinfo(np.int64).max)

    def to_bytes(self) -> bytes:
        """Serialize the index with FAISS."""
        content: bytes = faiss.serialize_index(self._index).tobytes()
        return content

    @classmethod
    def from_bytes(cls, content: bytes, recipe: Recipe, build_threads: int, count: int) -> Self:
        """Deserialize an index; raise ValueError unless it is the recipe's, with ``count`` rows."""
        index = faiss.deserialize_index(np.frombuffer(content, dtype=np.uint8))
        like = recipe.build()
        found, wanted = ((type(each), each.d, each.metric_type) for each in (index, like))
        if found != wanted or index.ntotal != count:
            raise ValueError("it is not the index that this backend's options describe")
        core = core_of(index)
        if isinstance(core, faiss.IndexIVF):
            core.nprobe = core_of(like).nprobe
        return cls(index, recipe, build_threads)

    def add(self, embeddings: Floats) -> None:
        """Append rows."""
        if isinstance(self._core, faiss.IndexHNSW):
            with openmp_threads(self._build_threads):
                self._index.add(embeddings)
        else:
            self._index.add(embeddings)

    def search(self, queries: Floats, k: int, numbers: RowNumbers) -> Ids:
        """Search the living rows."""
        rows: Ids = self._index.search(queries, k, params=self._parameters(k, numbers))[1]
        return rows

    def _parameters(self, k: int, numbers: RowNumbers) -> Any:
        library: Any = faiss  # its type stubs lack what its Python layer adds
        chosen: dict[str, Any] = {}
        if numbers.dead:
            chosen["sel"] = library.IDSelectorBitmap(np.packbits(numbers.alive, bitorder="little"))
        core = self._core
        if isinstance(core, faiss.IndexHNSW):
            parameters = library.SearchParametersHNSW(efSearch=max(self._recipe.ef_search, k), **chosen)
        elif isinstance(core, faiss.IndexIVF):
            parameters = library.SearchParametersIVF(nprobe=core.nprobe, **chosen)
        else:
            parameters = library.SearchParameters(**chosen)
        if isinstance(self._index, faiss.IndexPreTransform):
            parameters = library.SearchParametersPreTransform(index_params=parameters)
        return parameters


class GpuRows(RowIndex):
    """An index on a GPU, where FAISS cannot skip rows: more are fetched, and the bank drops the dead ones.

    Parameters
    ----------
    index : faiss.Index
        Trained and empty, on the CPU; it is copied to the GPU.
    recipe : Recipe
        Its parameters.
    resources : GpuResources
        The GPU.

    Raises
    ------
    InvalidArgumentError
        If FAISS does not support this index on GPUs.
    """

    k_limit = 2048

    def __init__(self, index: Any, recipe: Recipe, resources: GpuResources) -> None:
        self._resources = resources
        self.most_dead = self.k_limit // 4
        try:
            with resources.using() as native:
                self._index = [faiss.index_cpu_to_gpu(native, resources.device, index)]
        except RuntimeError as error:
            raise InvalidArgumentError(
                f"index must be one that FAISS supports on GPUs, such as 'Flat' or 'IVF256,Flat', got "
                f"{recipe.factory!r}: {error}"
            ) from error
        weakref.finalize(self, resources.dispose, self._index).atexit = False

    def add(self, embeddings: Floats) -> None:
        """Append rows."""
        with self._resources.using():
            self._index[0].add(embeddings)

    def search(self, queries: Floats, k: int, numbers: RowNumbers) -> Ids:
        """Search all rows, fetching enough to include k living ones if the limit allows."""
        if k > self.k_limit:
            raise InvalidArgumentError(
                f"k must be at most {self.k_limit} on a GPU, a limit of FAISS, got {k}: lower it, or use device='cpu'"
            )
        fetch = min(k + numbers.dead, len(numbers), self.k_limit)
        with self._resources.using():
            rows: Ids = self._index[0].search(queries, fetch)[1]
        return rows


@contextmanager
def openmp_threads(count: int) -> Iterator[None]:
    """Temporarily set the calling thread's number of OpenMP threads."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1 if getattr(_here, "is_forked", False) else count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def one_thread_after_fork() -> None:
    """Limit a forked process to one thread, as OpenMP would wait forever for the parent's workers."""
    faiss.omp_set_num_threads(1)
    _here.is_forked = True


_here = threading.local()
