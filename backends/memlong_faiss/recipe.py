"""What kind of FAISS index to build, checked before anything is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import faiss

from memlong.bank.exact import Similarity
from memlong.bank.validate import whole_number
from memlong.errors import InvalidArgumentError

_SEED = 1234
_POINTS_PER_CENTROID = 39
_EXAMPLES = "'Flat', 'HNSW32', 'IVF256,Flat', 'IVF256,PQ48', 'SQ8'"


@dataclass(frozen=True)
class Recipe:
    """An index-factory string and its settings.

    Attributes
    ----------
    dim : int
        Width of the embeddings.
    factory : str
        FAISS's index-factory string.
    similarity : "inner_product" or "l2"
        What to rank by.
    ef_construction, ef_search, nprobe : int
        Effort of an HNSW index's building and searching; lists that an IVF index visits.
    """

    dim: int
    factory: str
    similarity: Similarity
    ef_construction: int
    ef_search: int
    nprobe: int

    def __post_init__(self) -> None:
        for name in ("ef_construction", "ef_search", "nprobe"):
            whole_number(name, getattr(self, name), at_least=1)
        if not isinstance(self.factory, str):
            raise InvalidArgumentError(
                f"index must be an index-factory string such as {_EXAMPLES}, got {self.factory!r}"
            )

    @property
    def metric(self) -> int:
        """FAISS's number for the similarity."""
        return int(faiss.METRIC_L2 if self.similarity == "l2" else faiss.METRIC_INNER_PRODUCT)

    def build(self) -> Any:
        """Return a new, empty, perhaps untrained FAISS index.

        Raises
        ------
        InvalidArgumentError
            If FAISS cannot make it, with its reason, or the bank cannot use it.
        """
        try:
            index = faiss.index_factory(self.dim, self.factory, self.metric)
        except RuntimeError as error:
            reason = str(error).partition(": ")[2] or str(error)
            raise InvalidArgumentError(
                f"index {self.factory!r} is not one that FAISS can build for dim {self.dim} and "
                f"{self.similarity}: {reason}. Examples: {_EXAMPLES}"
            ) from error
        core = core_of(index)
        families = (faiss.IndexFlat, faiss.IndexHNSW, faiss.IndexIVF, faiss.IndexScalarQuantizer)
        if not isinstance(core, families) or (isinstance(core, faiss.IndexIVF) and not core.nlist):
            raise InvalidArgumentError(
                f"index {self.factory!r} makes a {type(core).__name__}, which cannot serve as a memory bank: "
                "use a Flat, HNSW, IVF or SQ one. Leave out IDMap and Refine: the bank itself keeps ids and "
                f"scores exactly. Examples: {_EXAMPLES}"
            )
        if isinstance(core, faiss.IndexHNSW):
            core.hnsw.efConstruction = self.ef_construction
        if isinstance(core, faiss.IndexIVF):
            core.nprobe = min(self.nprobe, core.nlist)
            _settle(core.cp)
        coder = coder_of(core)
        if hasattr(coder, "pq"):
            _settle(coder.pq.cp)
        if hasattr(coder, "do_polysemous_training"):
            coder.do_polysemous_training = False  # takes most of the training, for a filter that is not used
        return index


def core_of(index: Any) -> Any:
    """Return the index behind pre-transforms such as PCA and OPQ."""
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def coder_of(core: Any) -> Any:
    """Return the index that encodes the vectors: a graph has another do it."""
    return faiss.downcast_index(core.storage) if isinstance(core, faiss.IndexHNSW) else core


def is_lossy(index: Any) -> bool:
    """Tell whether the index searches something other than the vectors themselves."""
    exact = (faiss.IndexFlat, faiss.IndexHNSWFlat, faiss.IndexIVFFlat)
    return not isinstance(index, exact)


def training_points(index: Any, train_size: int | None) -> int:
    """Return how many vectors the index is trained on: `train_size`, or by default 39 for each centroid.

    Raises
    ------
    InvalidArgumentError
        If `train_size` is less than the number of centroids.
    """
    if index.is_trained:
        return 0
    core = core_of(index)
    coder = coder_of(core)
    centroids = max(getattr(core, "nlist", 1), coder.pq.ksub if hasattr(coder, "pq") else 1)
    if train_size is None:
        return max(_POINTS_PER_CENTROID * int(centroids), int(index.d))
    if whole_number("train_size", train_size, at_least=1) < centroids:
        raise InvalidArgumentError(
            f"train_size is {train_size}, but the index learns {centroids} centroids and needs at least one "
            "vector for each; raise it, or take fewer lists or bits"
        )
    return train_size


def _settle(clustering: Any) -> None:
    clustering.seed = _SEED
    clustering.min_points_per_centroid = 1
