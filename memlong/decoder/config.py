"""What a user chooses about a memory: sizes, layers, positions, backend and retriever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from memlong.decoder.model.layer_names import heads_by_layer, layers_as_text
from memlong.errors import InvalidArgumentError
from memlong.plugins.options import check_options
from memlong.settings import checked, documented, setting
from memlong.uri import hide_credentials, without_credentials

KvSourceName = Literal["layer", "shared", "latent"]
RetrieveFor = Literal["all", "answers"]
AdapterFor = Literal["all", "memory"]
PositionMode = Literal["zero", "overlaid", "compressed", "before-window", "original"]

_NOT_OPTIONS = {"dim", "name", "registry", "store"}
_LARGEST_GATE = 10_000
_HALVINGS = 4  # a token so many half-lives before the last no longer asks
_MOST_SCALES = 9  # chunks beyond exp(9) scales, a million tokens where the window has 1,024, share a position


@documented
@dataclass(frozen=True)
class MemoryConfig:
    """The settings of a `MemoryDecoder`. All sizes are in tokens unless said otherwise.

    Raises
    ------
    InvalidArgumentError
        If a value cannot work, naming the field, what it must be and the value.
    """

    backend: str | None = setting(
        "torch",
        "Memory backend, or 'none' for the plain window.",
        more="A name, as ``memlong backends`` lists them, or a URI that a plugin knows to read, such as "
        '``"milvus://localhost:19530"``. In Python, ``None`` is the plain window: it remembers nothing (the baseline).',
    )
    backend_options: Mapping[str, Any] = setting(
        dict, "Options of the backend.", more='Such as ``{"index": "HNSW32"}`` for ``faiss``.', metavar="K=V"
    )
    retriever: str = setting("lm", "Retriever by name, or a sentence-transformers hub id or folder.")
    retriever_options: Mapping[str, Any] = setting(
        dict, "Options of the retriever.", metavar="K=V", example="dim=1024"
    )
    query_map: str | None = setting(
        None,
        "Trained query map, as memlong train-retriever writes it; not for queries of focus_tokens.",
        more="It works only with the retriever it was trained for, with the same options. What is stored stays as it "
        "is, so a memory can be read with and without it. Answers ask by ``focus_tokens``, and so without it, unless "
        "that is 0.",
        metavar="FILE",
        needs_backend=True,
    )
    kv_source: KvSourceName = setting(
        "layer",
        "'layer': each layer's own K-V; 'shared': one layer's; 'latent': a vector a token.",
        more='The first is training-free. With ``"shared"`` one memory layer\'s K-V is stored and serves every '
        'retrieval layer (MemLong, arXiv 2408.16967); it needs training. With ``"latent"``, ``maps`` make each '
        "retrieval layer's own K-V of the vector.",
        needs_backend=True,
    )
    memory_layer: int | None = setting(
        None,
        "Layer whose K-V is 'shared'.",
        unset="the first of the upper half",
        least=0,
        needs_backend=True,
    )
    maps: str | None = setting(
        None, "Maps of kv_source 'latent', as memlong fit writes them.", metavar="FILE", needs_backend=True
    )
    gate_init: float | None = setting(
        None,
        "Bias of each head of each retrieval layer on its logits of memory, before training.",
        unset="no gates",
        more="The lower it is, the closer an untrained start is to the plain model.",
        least=-_LARGEST_GATE,
        most=_LARGEST_GATE,
    )
    gates: str | None = setting(None, "Gates that training wrote, instead of gate_init.", metavar="FILE")
    null_chunk: str | None = setting(
        None,
        "A chunk that training made, read in place of one of top_k.",
        metavar="FILE",
        needs_backend=True,
    )
    adapter_for: AdapterFor = setting(
        "all",
        "'all', or 'memory': an adapter acts only on rows that attend to retrieved chunks.",
        more='With ``"memory"`` LoRA is a part of memory: a row that has retrieved nothing is read by the plain model.',
        needs_backend=True,
    )
    retrieval_layers: str | Sequence[int] = setting(
        "all",
        "'all', or layers and ranges such as '15-29' or '3,7,11-13'.",
        more='``"all"`` is every full-attention layer. A list of numbers is read as such text.',
        needs_backend=True,
    )
    retrieval_heads: str = setting(
        "all",
        "'all', or K-V heads of retrieval layers, such as '15:0+2,16:1'.",
        more="As `memlong heads` prints them: layer, then heads. The other heads attend to the local window alone, and "
        "only these heads' K-V are stored. Needs ``kv_source='layer'``.",
        needs_backend=True,
    )
    chunk_size: int = setting(128, "Tokens of a chunk, the unit of memory.", least=1)
    embedding_overlap: int | None = setting(
        None,
        "Tokens before a chunk that its embedding covers too.",
        unset="an eighth of a chunk",
        more="Fewer than ``chunk_size``. Where the end of a chunk cuts a fact in two, the rest is found by words that "
        "stand so far before it. The chunks' K-V does not overlap.",
        least=0,
    )
    top_k: int = setting(8, "Chunks retrieved for a segment.", least=1)
    attended_tokens: int | None = setting(
        None,
        "Retrieved tokens that each token attends to, per K-V head.",
        unset="all of them",
        more="Each token chooses them itself, in whole pages of 16 tokens (or fewer, where 16 does not divide "
        "``chunk_size``), from the ``top_k`` chunks. Needs torch's ``attn_implementation='sdpa'``, and saves time on a "
        "CPU, with numba.",
        least=1,
        needs_backend=True,
    )
    local_window: int = setting(
        1024, "Local tokens attended to at most, the segment included, sink tokens apart.", least=1
    )
    sink_tokens: int = setting(
        4, "First tokens that every layer keeps (attention sinks).", more="See arXiv 2309.17453.", least=0
    )
    segment_size: int = setting(256, "Tokens of a forward call, and so the interval of retrieval.", least=1)
    retrieve_for: RetrieveFor = setting(
        "all",
        "'all', or 'answers': text that is read retrieves nothing.",
        more='With ``"answers"`` only what is generated, scored by `score`, or read with ``queries`` given attends to '
        "retrieved chunks. Reading is faster, and what is stored of a chunk depends on the window before it alone: for "
        "questions about a text, not where the text itself is to be predicted.",
        needs_backend=True,
    )
    query_tokens: int | None = setting(
        None,
        "Tokens that make a query.",
        unset="the text since the last retrieval",
        more="These are ``segment_size`` tokens before a segment, and ``retrieve_every`` while text is generated "
        "without ``focus_tokens``.",
        least=1,
    )
    focus_tokens: int = setting(
        16,
        "Half-life of the tokens of a query while text is generated; 0 for query_tokens that count alike.",
        more="The last token counts most, one so many before it half as much, and none that is four times as far. They "
        "ask for what few chunks hold, wherever that is in the text: a question, say, at the end of other text. A "
        "retriever that cannot weigh tokens asks with the last ``focus_tokens``.",
        least=0,
    )
    answer_cutoff: float = setting(
        0.0,
        "Share of the best chunk's score below which chunks are left out of answers.",
        more="So a question that one chunk answers gets few chunks, and one that asks for several things up to "
        "``top_k``. It applies to what is generated, scored by `score`, or read with ``queries`` given. Scores are the "
        "bank's: cosines, unless the retriever compares otherwise, and for one that reranks those of its candidates. "
        "What share tells chunks apart depends on the retriever; with ``focus_tokens=0``, `lm` scores all chunks "
        "nearly alike. Where even the best one scores 0 or less, none is left out.",
        least=0,
        most=1,
        needs_backend=True,
    )
    position_mode: PositionMode | None = setting(
        None,
        "Retrieved keys stand at 'zero', 'overlaid', 'compressed', 'before-window' or 'original'.",
        unset="'before-window', or 'zero' where the model has too few positions for it",
        more='``"zero"``: all at the one position between sinks and window (the MemLong paper\'s position 0). '
        '``"overlaid"``: every chunk in order, all of them over the same positions just before the window. '
        '``"compressed"``: every chunk in order, at a distance from the window that grows with the logarithm of the '
        "true one; chunks of another text that do not end before the window, right before it. "
        '``"before-window"``: one chunk after the other, running up to the window. ``"original"``: where they stood in '
        "the text, the window too, so that memory of everything equals full attention; only for texts within the "
        "model's trained positions.",
    )
    retrieve_every: int | None = setting(
        None,
        "Tokens generated between retrievals, at most segment_size.",
        unset="half a chunk",
        least=1,
    )
    store: Mapping[str, Any] = setting(
        dict,
        "Where keys and values are kept: device, host, disk, disk_budget, objects, readers, dtype.",
        unset="where they are made",
        more='The arguments of `TieredStore`: ``{"host": "2GB", "disk": "/path/to/folder"}``, or ``"objects": '
        '"s3://bucket/folder"`` in place of ``disk``.',
        metavar="K=V",
        example="host=1GB",
        texts=frozenset({"disk", "objects", "dtype"}),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "retrieval_layers", layers_as_text(self.retrieval_layers))
        if not isinstance(self.retrieval_layers, str):
            raise InvalidArgumentError(
                "retrieval_layers must be 'all', layers and ranges such as '3,7,11-13', or a list of numbers such as "
                f"[3, 7], got {self.retrieval_layers!r}"
            )
        for name, value in checked(self).items():
            object.__setattr__(self, name, value)
        if self.retrieval_interval > self.segment_size:
            raise InvalidArgumentError(
                f"retrieve_every must be at most segment_size ({self.segment_size}), which the window has space for, "
                f"got {self.retrieve_every}"
            )
        if self.overlap_length >= self.chunk_size:
            raise InvalidArgumentError(
                f"embedding_overlap must be less than chunk_size ({self.chunk_size}), got {self.embedding_overlap}"
            )
        for name, source in (("memory_layer", "shared"), ("maps", "latent")):
            value = getattr(self, name)
            if value is not None and self.kv_source != source:
                raise InvalidArgumentError(
                    f"{name} must be None unless kv_source is {source!r}, got {value!r} with {self.kv_source!r}: set "
                    f"kv_source to {source!r}, or leave {name} out"
                )
        if self.retrieval_heads.strip() != "all":
            heads_by_layer(self.retrieval_heads)  # is refused if malformed, before a model is loaded
            if self.kv_source != "layer":
                raise InvalidArgumentError(
                    f"retrieval_heads must be 'all' unless kv_source is 'layer', got {self.retrieval_heads!r:.80} with "
                    f"{self.kv_source!r}"
                )
        if self.store:
            from memlong.bank.store.arguments import check_store  # imports torch
            from memlong.bank.store.tiers import TieredStore

            check_options("store", TieredStore, self.store)
            check_store(**self.store)
        taken = sorted(_NOT_OPTIONS & set(self.backend_options))
        if taken:
            raise InvalidArgumentError(
                f"backend_options must not hold {', '.join(taken)}, which the decoder sets itself: dim is the "
                "retriever's, and store is a setting of its own"
            )
        if self.local_window < self.segment_size + self.chunk_size:
            raise InvalidArgumentError(
                f"local_window must be at least {self.segment_size + self.chunk_size}, to hold a segment "
                f"({self.segment_size} tokens) and a chunk that is still filling ({self.chunk_size}), got "
                f"{self.local_window}: raise it, or lower segment_size or chunk_size"
            )

    def __repr__(self) -> str:
        """All settings, as `as_dict` gives them."""
        settings = ", ".join(f"{name}={value!r}" for name, value in self.as_dict().items())
        return f"{type(self).__name__}({settings})"

    def as_dict(self) -> dict[str, Any]:
        """Return all settings as files and reports may hold them: with ``***`` for what may be secret."""
        settings = asdict(self)
        for name in ("backend_options", "retriever_options", "store"):
            settings[name] = hide_credentials(settings[name])
        if self.backend is not None:
            settings["backend"] = without_credentials(self.backend)
        return settings

    @property
    def overlap_length(self) -> int:
        """Tokens before a chunk that its embedding covers."""
        return self.chunk_size // 8 if self.embedding_overlap is None else self.embedding_overlap

    @property
    def query_length(self) -> int:
        """Tokens before a segment that make its query."""
        return self.segment_size if self.query_tokens is None else self.query_tokens

    @property
    def answer_query_length(self) -> int:
        """Tokens that make a query while text is generated."""
        return _HALVINGS * self.focus_tokens or self.query_tokens or self.retrieval_interval

    @property
    def retrieval_interval(self) -> int:
        """Tokens after which memory is retrieved again while text is generated."""
        if self.retrieve_every is not None:
            return self.retrieve_every
        return min(max(1, self.chunk_size // 2), self.segment_size)

    @property
    def window_past(self) -> int:
        """Tokens before a segment, sinks apart, that the local window can keep."""
        return self.local_window - self.segment_size

    @property
    def position_span(self) -> int:
        """Positions that a stream of any length needs, for the modes that re-base the window."""
        return self.sink_tokens + (self.memory_span(self.top_k) if self.backend else 0) + self.local_window

    def distance_scale(self, local_window: int | None = None) -> int:
        """The s of "compressed", by which a distance of d tokens from the window becomes s ln(1 + d/s)."""
        return max(1, (local_window or self.local_window) // 8)

    def memory_span(self, chunks: int, local_window: int | None = None) -> int:
        """Positions that this many retrieved chunks take between sinks and window; before another window, if given."""
        of_modes: dict[str | None, int] = {
            "zero": 1,
            "overlaid": self.chunk_size,
            "compressed": self.chunk_size + _MOST_SCALES * self.distance_scale(local_window),
        }
        return of_modes.get(self.position_mode, chunks * self.chunk_size) if chunks else 0
