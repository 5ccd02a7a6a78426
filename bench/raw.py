"""The bare index libraries, called the way their backends call them: the baseline for a bank's overhead."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch


class Raw(ABC):
    """A single-threaded inner-product index of float32 unit vectors, without ids."""

    @abstractmethod
    def add(self, vectors: np.ndarray) -> None:
        """Add vectors [n, dim]."""

    @abstractmethod
    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Return the row numbers [q, k] of the nearest vectors."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the index as the library saves it, vectors included."""


class RawTorch(Raw):
    """One matrix product and `topk`; vectors are written into a preallocated matrix."""

    def __init__(self, dim: int, capacity: int, device: torch.device) -> None:
        self._matrix = torch.empty(capacity, dim, device=device)
        self._count = 0

    def add(self, vectors: np.ndarray) -> None:
        """Copy the vectors into the matrix."""
        self._matrix[self._count : self._count + len(vectors)] = torch.from_numpy(vectors)
        self._count += len(vectors)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Multiply, and return the largest."""
        products = torch.from_numpy(queries).to(self._matrix.device) @ self._matrix[: self._count].T
        return products.topk(k, dim=1).indices.cpu().numpy()

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        return self._matrix[: self._count].nbytes


class RawFaiss(Raw):
    """A FAISS index by factory string, on the CPU or a GPU, with the settings of FaissIndex."""

    def __init__(
        self,
        dim: int,
        device: torch.device,
        index: str,
        sample: np.ndarray,
        ef_search: int = 64,
        nprobe: int = 16,
    ) -> None:
        import faiss

        self._on_gpu = device.type == "cuda"
        self._index = faiss.index_factory(dim, index, faiss.METRIC_INNER_PRODUCT)
        if isinstance(self._index, faiss.IndexHNSW):
            self._index.hnsw.efConstruction = 200
            self._index.hnsw.efSearch = ef_search
        if isinstance(self._index, faiss.IndexIVF):
            self._index.train(sample)
            self._index.nprobe = nprobe
        if self._on_gpu:
            self._resources = faiss.StandardGpuResources()
            self._index = faiss.index_cpu_to_gpu(self._resources, device.index or 0, self._index)

    def add(self, vectors: np.ndarray) -> None:
        """Add."""
        self._index.add(vectors)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Search."""
        return self._index.search(queries, k)[1]

    @property
    def nbytes(self) -> int:
        """Bytes of FAISS's index file."""
        import faiss

        index = faiss.index_gpu_to_cpu(self._index) if self._on_gpu else self._index
        return faiss.serialize_index(index).nbytes


class RawHnswlib(Raw):
    """hnswlib with the settings of HnswlibIndex, at full capacity from the start."""

    def __init__(self, dim: int, capacity: int, ef: int = 64) -> None:
        import hnswlib

        self._index = hnswlib.Index("ip", dim)
        self._index.init_index(capacity, M=16, ef_construction=200, random_seed=100)
        self._index.set_ef(ef)

    def add(self, vectors: np.ndarray) -> None:
        """Add, labeled with consecutive row numbers."""
        first = self._index.element_count
        self._index.add_items(vectors, np.arange(first, first + len(vectors)), num_threads=1)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Search."""
        return self._index.knn_query(queries, k, num_threads=1)[0].astype(np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of hnswlib's index file."""
        return self._index.index_file_size()


RAW: Mapping[str, Callable[..., Raw]] = {
    "torch": lambda sample, capacity, device: RawTorch(sample.shape[1], capacity, device),
    "faiss": lambda sample, _, device, **options: RawFaiss(sample.shape[1], device, sample=sample, **options),
    "hnswlib": lambda sample, capacity, _, **options: RawHnswlib(sample.shape[1], capacity, **options),
}
"""By backend: creates its library's index, given sample vectors [n, dim], a capacity and a device."""


def make_raw(
    backend: str, options: Mapping[str, Any], sample: np.ndarray, capacity: int, device: torch.device
) -> Raw:
    """Return an empty index of a backend's library, with these options."""
    return RAW[backend](sample, capacity, device, **options)


def use_one_thread() -> None:
    """Make torch and FAISS, which may bundle its own OpenMP, single-threaded."""
    torch.set_num_threads(1)
    if find_spec("faiss") is not None:
        import faiss

        faiss.omp_set_num_threads(1)
