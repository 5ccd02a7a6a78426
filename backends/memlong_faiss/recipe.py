"""What kind of FAISS index to build, checked before anything is stored."""

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
"""Of building and searching; FAISS does not take all that Python does."""
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
        odd = _absurdity(self.factory, self.dim)
        if odd:
            raise InvalidArgumentError(f"index {self.factory[:_LONGEST]!r} {odd}. Examples: {_EXAMPLES}")

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
            raise InvalidArgumentError(
                f"index {self.factory!r} is not one that FAISS can build for dim {self.dim} and "
                f"{self.similarity}: {_reason(error)}. Examples: {_EXAMPLES}"
            ) from error
        core = core_of(index)
        families = (faiss.IndexFlat, faiss.IndexHNSW, faiss.IndexIVF, faiss.IndexScalarQuantizer)
        if not isinstance(core, families) or (isinstance(core, faiss.IndexIVF) and not core.nlist):
            raise InvalidArgumentError(
                f"index {self.factory!r} makes a {type(core).__name__}, which cannot serve as a memory bank: "
                "use a Flat, HNSW, IVF or SQ one. Leave out IDMap and Refine: the bank itself keeps ids and "
                f"scores exactly. Examples: {_EXAMPLES}"
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
            coder.do_polysemous_training = False  # takes most of the training, for a filter that is not used
        return index

    def train(self, index: Any, embeddings: Floats) -> None:
        """Train an index that has to be.

        Raises
        ------
        InvalidArgumentError
            If FAISS cannot, with its reason.
        """
        if index.is_trained:
            return
        try:
            index.train(embeddings)
        except RuntimeError as error:
            raise InvalidArgumentError(
                f"FAISS cannot train index {self.factory!r} on {len(embeddings):,} embeddings: {_reason(error)}. Give "
                f"another index, or a larger train_size. Examples: {_EXAMPLES}"
            ) from error


def _reason(error: RuntimeError) -> str:
    return str(error).partition(": ")[2] or str(error)


def _fails_later(index: Any, core: Any) -> str | None:
    """Say what FAISS builds, and fails on only when it trains or searches."""
    chain: Any = index.chain if isinstance(index, faiss.IndexPreTransform) else None
    for number in range(chain.size() if chain else 0):
        each = faiss.downcast_VectorTransform(chain.at(number))
        if isinstance(each, faiss.PCAMatrix) and each.d_out > each.d_in:
            return f"reduces {each.d_in} numbers to {each.d_out} by PCA; give at most {each.d_in}"
    if isinstance(core, faiss.IndexIVFAdditiveQuantizerFastScan) or isinstance(
        coder_of(core), faiss.Index2Layer
    ):
        return f"makes a {type(core).__name__} that takes no settings of a search"
    if isinstance(core, faiss.IndexIVF):
        lists = faiss.downcast_index(core.quantizer)
        if not isinstance(lists, _FINDERS):
            return f"finds its lists by a {type(lists).__name__}; use a Flat, HNSW or SQ one, or leave it out"
    return None


def _absurdity(factory: str, dim: int) -> str | None:
    """Say what FAISS would die of, or take gigabytes for at once: the text may come with a stranger's snapshot."""
    if len(factory) > _LONGEST:
        return f"and more has {len(factory):,} characters, of at most {_LONGEST}"
    for name, digits in re.findall(r"([A-Za-z]*)([0-9]+)", factory):
        number, widest = int(digits), max(4096, 4 * dim)
        if name == "HNSW" and number not in _LINKS:
            return f"has {number} links in its graph, expected {_LINKS[0]} to {_LINKS[-1]}"
        if name == "x" and dim << min(number, 64) > _MOST_CODEBOOK:
            return f"has codes of {number} bits, whose codebook for dim {dim} takes too much; use 8"
        if number > (_MOST_LISTS if name == "IVF" else widest):
            return f"has {name}{number}, expected at most {_MOST_LISTS if name == 'IVF' else widest:,}"
    return None


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
    if train_size < centroids:
        raise InvalidArgumentError(
            f"train_size is {train_size}, but the index learns {centroids} centroids and needs at least one "
            "vector for each; raise it, or take fewer lists or bits"
        )
    return train_size


def _settle(clustering: Any) -> None:
    clustering.seed = _SEED
    clustering.min_points_per_centroid = 1
