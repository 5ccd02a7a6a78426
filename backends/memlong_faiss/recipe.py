"""Build a FAISS index from a factory string, which is checked before anything is stored."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import faiss

from memlong.bank import Floats
from memlong.bank.index.exact import Similarity
from memlong.errors import InvalidArgumentError

_SEED = 1234
_POINTS_PER_CENTROID = 39
_MOST_LISTS = 2**20
_LINKS = range(2, 513)
_MOST_CODEBOOK = 2**26  # numbers
_LONGEST = 200

MOST_EFFORT = 2**20
"""Largest effort of building or searching; FAISS cannot take every Python integer."""
_FINDERS = (
    faiss.IndexFlat,
    faiss.IndexHNSW,
    faiss.IndexScalarQuantizer,
    faiss.IndexIVF,
    faiss.MultiIndexQuantizer,
)
_EXAMPLES = "'Flat', 'HNSW32', 'IVF256,Flat', 'IVF256,PQ48', 'SQ8'"


@dataclass(frozen=True)
class Recipe:
    """An index-factory string and its parameters.

    Attributes
    ----------
    dim : int
        Dimension of the embeddings.
    factory : str
        FAISS's index-factory string.
    similarity : "inner_product" or "l2"
        Similarity to rank by.
    ef_construction, ef_search, nprobe : int
        HNSW's efConstruction and efSearch; number of lists that an IVF index searches.
    """

    dim: int
    factory: str
    similarity: Similarity
    ef_construction: int
    ef_search: int
    nprobe: int

    def __post_init__(self) -> None:
        odd = _absurdity(self.factory, self.dim)
        if odd:
            raise InvalidArgumentError(f"index {self.factory[:_LONGEST]!r} {odd}. Examples: {_EXAMPLES}")

    @property
    def metric(self) -> int:
        """FAISS's constant for the similarity."""
        return int(faiss.METRIC_L2 if self.similarity == "l2" else faiss.METRIC_INNER_PRODUCT)

    def build(self) -> Any:
        """Return a new, empty FAISS index, untrained if it needs training.

        Raises
        ------
        InvalidArgumentError
            If FAISS cannot build it, or the bank cannot use it.
        """
        try:
            index = faiss.index_factory(self.dim, self.factory, self.metric)
        except RuntimeError as error:
            raise InvalidArgumentError(
                f"index must be one that FAISS can build for dim {self.dim} and {self.similarity}, got "
                f"{self.factory!r}: {_reason(error)}. Examples: {_EXAMPLES}"
            ) from error
        core = core_of(index)
        families = (faiss.IndexFlat, faiss.IndexHNSW, faiss.IndexIVF, faiss.IndexScalarQuantizer)
        if not isinstance(core, families) or (isinstance(core, faiss.IndexIVF) and not core.nlist):
            raise InvalidArgumentError(
                f"index must be a Flat, HNSW, IVF or SQ one, got {self.factory!r}, a {type(core).__name__}: leave out "
                f"IDMap and Refine, as the bank itself stores ids and scores exactly. Examples: {_EXAMPLES}"
            )
        if odd := _fails_later(index, core):
            raise InvalidArgumentError(f"index {self.factory!r} {odd}. Examples: {_EXAMPLES}")
        if isinstance(core, faiss.IndexHNSW):
            core.hnsw.efConstruction = self.ef_construction
        if isinstance(core, faiss.IndexIVF):
            core.nprobe = min(self.nprobe, core.nlist)
            _settle(core.cp)
        coder = coder_of(core)
        if hasattr(coder, "pq"):
            _settle(coder.pq.cp)
        if hasattr(coder, "do_polysemous_training"):
            coder.do_polysemous_training = False  # most of the training time, for an unused filter
        return index

    def train(self, index: Any, embeddings: Floats) -> None:
        """Train an index that needs it.

        Raises
        ------
        InvalidArgumentError
            If FAISS cannot train it.
        """
        if index.is_trained:
            return
        try:
            index.train(embeddings)
        except RuntimeError as error:
            raise InvalidArgumentError(
                f"FAISS cannot train index {self.factory!r} on {len(embeddings):,} embeddings: {_reason(error)}. Use "
                f"another index, or a larger train_size. Examples: {_EXAMPLES}"
            ) from error


def _reason(error: RuntimeError) -> str:
    return str(error).partition(": ")[2] or str(error)


def _fails_later(index: Any, core: Any) -> str | None:
    """Return what is wrong with an index that FAISS builds but fails to train or search, or None."""
    chain: Any = index.chain if isinstance(index, faiss.IndexPreTransform) else None
    for number in range(chain.size() if chain else 0):
        each = faiss.downcast_VectorTransform(chain.at(number))
        if isinstance(each, faiss.PCAMatrix) and each.d_out > each.d_in:
            return f"must not have more PCA dimensions than the {each.d_in} of its input, got {each.d_out}"
    if isinstance(core, faiss.IndexIVFAdditiveQuantizerFastScan) or isinstance(
        coder_of(core), faiss.Index2Layer
    ):
        return f"makes a {type(core).__name__}, which does not support search parameters"
    if isinstance(core, faiss.IndexIVF):
        lists = faiss.downcast_index(core.quantizer)
        if not isinstance(lists, _FINDERS):
            return f"must have a Flat, HNSW or SQ coarse quantizer, got a {type(lists).__name__}"
    return None


def _absurdity(factory: str, dim: int) -> str | None:
    """Return why an index would crash FAISS or take gigabytes at once, or None: a snapshot may be untrusted."""
    if len(factory) > _LONGEST:
        return f"must have at most {_LONGEST} characters, got {len(factory):,}"
    for name, digits in re.findall(r"([A-Za-z]*)([0-9]+)", factory):
        number, widest = int(digits), max(4096, 4 * dim)
        if name == "HNSW" and number not in _LINKS:
            return f"must have {_LINKS[0]} to {_LINKS[-1]} links in its graph, got {number}"
        if name == "x" and dim << min(number, 64) > _MOST_CODEBOOK:
            return f"must have codes of fewer bits, as the codebook for dim {dim} is too large, got {number}: use 8"
        if number > (_MOST_LISTS if name == "IVF" else widest):
            return f"must have at most {name}{_MOST_LISTS if name == 'IVF' else widest:,}, got {name}{number}"
    return None


def core_of(index: Any) -> Any:
    """Return the index behind pre-transforms such as PCA and OPQ."""
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def coder_of(core: Any) -> Any:
    """Return the index that encodes the vectors; for a graph, that is its storage."""
    return faiss.downcast_index(core.storage) if isinstance(core, faiss.IndexHNSW) else core


def is_lossy(index: Any) -> bool:
    """Whether the index compresses the vectors that it searches."""
    exact = (faiss.IndexFlat, faiss.IndexHNSWFlat, faiss.IndexIVFFlat)
    return not isinstance(index, exact)


def training_points(index: Any, train_size: int | None) -> int:
    """Return the number of training vectors: `train_size`, or by default 39 per centroid.

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
    if train_size < centroids:
        raise InvalidArgumentError(
            f"train_size must be at least {centroids}, the number of centroids to learn, got {train_size}: raise it, "
            "or use fewer lists or bits"
        )
    return train_size


def _settle(clustering: Any) -> None:
    clustering.seed = _SEED
    clustering.min_points_per_centroid = 1
