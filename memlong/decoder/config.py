"""What a user chooses about a memory: sizes, layers, positions, backend and retriever."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from typing import Any, Literal, get_args

import numpy as np

from memlong.decoder.layer_names import layers_as_text
from memlong.errors import InvalidArgumentError
from memlong.plugins.uri import hide_credentials, without_credentials

KvSourceName = Literal["layer", "shared", "latent"]
ChunkOrder = Literal["position", "score"]
PositionMode = Literal["zero", "overlaid", "before-window", "original"]

_KINDS: dict[str, Any] = {
    "backend": str | None,
    "backend_options": Mapping,
    "retriever": str,
    "maps": str | None,
    "gates": str | None,
    "retriever_options": Mapping,
    "retrieval_layers": str,
    "store": Mapping,
}
_WHOLE = {  # the least that a number of tokens, chunks or layers may be
    "chunk_size": 1,
    "top_k": 1,
    "local_window": 1,
    "sink_tokens": 0,
    "segment_size": 1,
    "neighbours": 0,
    "query_tokens": 1,
    "retrieve_every": 1,
    "memory_tokens": 1,
    "memory_layer": 0,
}
_NOT_OPTIONS = {"dim", "name", "registry", "store"}
_LARGEST_GATE = 10_000
_LAYERS = "'all', layers and ranges such as '3,7,11-13', or a list of numbers such as [3, 7]"
_EXPECTED: dict[Any, str] = {
    str: "text",
    str | None: "a name, or None",
    Mapping: "a mapping from option to value",
}


@dataclass(frozen=True)
class MemoryConfig:
    """The settings of a :class:`~memlong.decoder.MemoryDecoder`. All sizes are in tokens unless said otherwise.

    Parameters
    ----------
    backend
        Name of the memory backend, as ``memlong backends`` lists them, or a URI that a plugin knows to read, such as
        ``"milvus://localhost:19530"``; ``None`` streams over the plain local
        window and remembers nothing (the baseline).
    backend_options
        Options of that backend, e.g. ``{"index": "HNSW32"}`` for ``faiss``.
    retriever
        Name of a retriever, or a sentence-transformers hub id or folder.
    retriever_options
        Options of that retriever.
    kv_source
        ``"layer"``: each retrieval layer stores and reads its own K-V (training-free). ``"shared"``: one memory layer's
        K-V is stored and serves every retrieval layer (MemLong, arXiv 2408.16967); it needs training. ``"latent"``: one
        vector a token is stored, from which ``maps`` make each retrieval layer's own K-V.
    memory_layer
        With ``kv_source="shared"``, the layer whose K-V is stored; ``None`` means the first of the upper half.
    maps
        With ``kv_source="latent"``, the file that ``memlong fit`` wrote.
    gate_init
        What each head of each retrieval layer adds to its logits of memory, until training changes it; ``None`` for no
        gates at all. The lower, the nearer to the plain model does one start that was not trained to read memory.
    gates
        A file of gates that training wrote, instead of ``gate_init``.
    retrieval_layers
        ``"all"`` (every full-attention layer), or layers and ranges such as ``"15-29"`` or ``"3,7,11-13"``; a list of
        numbers such as ``[3, 7]`` is read as such text.
    chunk_size
        Tokens of a chunk, the unit of memory.
    top_k
        Chunks that are retrieved for a segment.
    memory_tokens
        Tokens that are retrieved for a segment, at most, instead of ``top_k``.
    neighbours
        Chunks that come along with a hit, those that follow it in the text; they count toward ``top_k``.
    min_score
        Chunks that score less are not attended to; ``None`` takes whatever is best. Of what kind a score is, the
        retriever's metric says: between -1 and 1 for cosine.
    chunk_order
        ``"position"``: retrieved chunks stand in the order of the text; ``"score"``: the best next to the window. Where
        all stand at one position (``position_mode="zero"``), it makes no difference.
    local_window
        Tokens attended to locally at most, the segment itself included, sink tokens apart.
    sink_tokens
        First tokens of the stream that every layer keeps for good (attention sinks, arXiv 2309.17453).
    segment_size
        Tokens of one forward call, and so the interval of retrieval.
    query_tokens
        Tokens that make a query; ``None`` means the text since the last retrieval: ``segment_size`` tokens before a
        segment, ``retrieve_every`` while text is generated.
    position_mode
        Where retrieved keys stand. ``"zero"``: all at the one position between sinks and window (the MemLong
        paper's position 0, arXiv 2408.16967). ``"overlaid"``: every chunk in order, all of them over the same
        positions just before the window. ``"before-window"``: one chunk after the other, running up to the window.
        ``"original"``: where they stood in the text, the window too, so that memory of everything equals full
        attention; only for texts within the model's trained positions.
    retrieve_every
        Tokens after which memory is retrieved anew while text is generated; ``None`` means half a chunk. At most
        ``segment_size``.
    store
        Where keys and values are kept, as the arguments of :class:`~memlong.bank.TieredStore`:
        ``{"host": "2GB", "disk": "/path/to/folder", "dtype": "int8"}``. By default they stay where they are made.

    Raises
    ------
    InvalidArgumentError
        If a value cannot work, naming the field, the value and what was expected.
    """

    backend: str | None = "torch"
    backend_options: Mapping[str, Any] = field(default_factory=dict)
    retriever: str = "lm"
    retriever_options: Mapping[str, Any] = field(default_factory=dict)
    kv_source: KvSourceName = "layer"
    memory_layer: int | None = None
    maps: str | None = None
    gate_init: float | None = None
    gates: str | None = None
    retrieval_layers: str | Sequence[int] = "all"
    chunk_size: int = 128
    top_k: int = 8
    memory_tokens: int | None = None
    neighbours: int = 0
    min_score: float | None = None
    chunk_order: ChunkOrder = "position"
    local_window: int = 1024
    sink_tokens: int = 4
    segment_size: int = 256
    query_tokens: int | None = None
    position_mode: PositionMode = "zero"
    retrieve_every: int | None = None
    store: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "retrieval_layers", layers_as_text(self.retrieval_layers))
        for name, least in _WHOLE.items():
            if getattr(self, name) is not None or _FIELDS[name].default is not None:
                object.__setattr__(self, name, _integer(name, getattr(self, name), least))
        if self.retrieval_interval > self.segment_size:
            raise InvalidArgumentError(
                f"retrieve_every is {self.retrieve_every}; expected at most segment_size, {self.segment_size}, for "
                "which the window keeps room."
            )
        _check_choice("position_mode", self.position_mode, get_args(PositionMode))
        _check_choice("kv_source", self.kv_source, get_args(KvSourceName))
        _check_choice("chunk_order", self.chunk_order, get_args(ChunkOrder))
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                shown = f"of type {type(value).__name__}" if name.endswith("_options") else repr(value)
                expected = _LAYERS if name == "retrieval_layers" else _EXPECTED[kind]
                raise InvalidArgumentError(f"{name} is {shown}; expected {expected}.")
            if kind is Mapping:  # a copy: whoever gave it may change it
                object.__setattr__(self, name, dict(value))
        if self.memory_layer is not None and self.kv_source != "shared":
            raise InvalidArgumentError(
                f"memory_layer is {self.memory_layer}, but kv_source is {self.kv_source!r}: it goes with 'shared' "
                "alone."
            )
        if self.maps is not None and self.kv_source != "latent":
            raise InvalidArgumentError(
                f"maps is {self.maps!r}, but kv_source is {self.kv_source!r}: set kv_source to 'latent', or leave maps "
                "out."
            )
        taken = sorted(_NOT_OPTIONS & set(self.backend_options))
        if taken:
            raise InvalidArgumentError(
                f"backend_options holds {', '.join(taken)}, which the decoder sets itself: dim is the retriever's, and "
                "where keys and values live is said with store."
            )
        for name in ("min_score", "gate_init"):
            number: Any = getattr(self, name)
            if number is None:
                continue
            if (
                isinstance(number, bool)
                or not isinstance(number, int | float | np.floating | np.integer)
                or not isfinite(number)
            ):
                raise InvalidArgumentError(f"{name} is {number!r}; expected a number.")
            if type(number) not in (int, float):  # NumPy's
                object.__setattr__(self, name, float(number))
        if self.gate_init is not None and abs(self.gate_init) > _LARGEST_GATE:
            raise InvalidArgumentError(
                f"gate_init is {self.gate_init!r}; expected a number from {-_LARGEST_GATE} to {_LARGEST_GATE}, as it "
                "is added to logits."
            )
        if self.memory_tokens is not None and self.memory_tokens < self.chunk_size:
            raise InvalidArgumentError(
                f"memory_tokens is {self.memory_tokens}, less than one chunk ({self.chunk_size}): nothing would ever "
                "be retrieved. Raise it, or lower chunk_size."
            )
        if self.local_window < self.segment_size + self.chunk_size:
            raise InvalidArgumentError(
                f"local_window is {self.local_window}, but it must hold a segment ({self.segment_size} tokens) and a "
                f"chunk that is still filling ({self.chunk_size}): use local_window >= "
                f"{self.segment_size + self.chunk_size}, or a smaller segment_size or chunk_size."
            )

    def __repr__(self) -> str:
        """All settings, as :meth:`as_dict` gives them."""
        settings = ", ".join(f"{name}={value!r}" for name, value in self.as_dict().items())
        return f"{type(self).__name__}({settings})"

    def as_dict(self) -> dict[str, Any]:
        """Return all settings as files and reports may hold them: with ``***`` for what may be secret."""
        settings = asdict(self)
        for name in ("backend_options", "retriever_options"):
            settings[name] = hide_credentials(settings[name])
        if self.backend is not None:
            settings["backend"] = without_credentials(self.backend)
        return settings

    @property
    def query_length(self) -> int:
        """Tokens before a segment that make its query."""
        return self.segment_size if self.query_tokens is None else self.query_tokens

    @property
    def retrieval_interval(self) -> int:
        """Tokens after which memory is retrieved anew while text is generated."""
        if self.retrieve_every is not None:
            return self.retrieve_every
        return min(max(1, self.chunk_size // 2), self.segment_size)

    @property
    def retrieved_chunks(self) -> int:
        """Chunks that are retrieved for a segment, at most."""
        return self.top_k if self.memory_tokens is None else self.memory_tokens // self.chunk_size

    @property
    def window_past(self) -> int:
        """Tokens before a segment, sinks apart, that the local window can keep."""
        return self.local_window - self.segment_size

    @property
    def position_span(self) -> int:
        """Positions that a stream of any length needs, for the modes that re-base the window."""
        return (
            self.sink_tokens
            + (self.memory_span(self.retrieved_chunks) if self.backend else 0)
            + self.local_window
        )

    def memory_span(self, chunks: int) -> int:
        """Positions that so many retrieved chunks take between sinks and window."""
        spans = {"zero": 1, "overlaid": self.chunk_size}
        return spans.get(self.position_mode, chunks * self.chunk_size) if chunks else 0


_FIELDS = {each.name: each for each in fields(MemoryConfig)}


def _integer(name: str, value: Any, least: int) -> int:
    """Return a plain integer, for NumPy and torch have integers of their own."""
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise InvalidArgumentError(f"{name} is {value!r}; expected an integer of at least {least}.")
    return number


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidArgumentError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}.")
