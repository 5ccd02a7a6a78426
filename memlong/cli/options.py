"""The options that commands share: which model, which memory, and how they become a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memlong.cli.values import key_values
from memlong.errors import InvalidArgumentError

if TYPE_CHECKING:
    from memlong.decoder import MemoryConfig

_NEED_A_BACKEND = (
    "kv_source",
    "memory_layer",
    "maps",
    "retrieval_layers",
    "memory_tokens",
    "neighbours",
    "min_score",
    "chunk_order",
)

Model = Annotated[
    str, typer.Option(help="Hub id, folder, GGUF file, or 'demo' (SmolLM2-135M-Instruct from pip).")
]
ModelUnlessAdapter = Annotated[
    str | None,
    typer.Option(
        help="Hub id, folder, GGUF file, or 'demo' (SmolLM2-135M-Instruct from pip)  [default: the adapter's]"
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER", help="Trained decoder (memlong train), or its hub id; brings its settings."
    ),
]
Backend = Annotated[str, typer.Option(help="Memory backend, or 'none' for the plain window.")]
BackendOption = Annotated[
    list[str] | None, typer.Option(metavar="K=V", help="Option of the backend; may be repeated.")
]
RetrieverName = Annotated[
    str, typer.Option(help="Retriever by name, or a sentence-transformers hub id or folder.")
]
RetrieverOption = Annotated[
    list[str] | None, typer.Option(metavar="K=V", help="Option of the retriever; may be repeated.")
]
StoreOption = Annotated[
    list[str] | None,
    typer.Option(
        "--store",
        metavar="K=V",
        help="Where keys and values are kept: device, host, disk, disk_budget, dtype; may be repeated.",
    ),
]
KvSource = Annotated[
    str,
    typer.Option(help="'layer': each layer's own K-V; 'shared': one layer's; 'latent': a vector a token."),
]
MemoryLayer = Annotated[
    int | None, typer.Option(help="Layer whose K-V is 'shared'  [default: first of the upper half]")
]
Maps = Annotated[str | None, typer.Option(metavar="FILE", help="Of --kv-source latent: see memlong fit.")]
GateInit = Annotated[
    float | None,
    typer.Option(help="Bias of each head on logits of memory, before training  [default: no gates]"),
]
RetrievalLayers = Annotated[str, typer.Option(help="'all', or such as '15-29' or '3,7,11'.")]
ChunkSize = Annotated[int, typer.Option(help="Tokens of a chunk.")]
TopK = Annotated[int, typer.Option(help="Chunks retrieved for a segment.")]
LocalWindow = Annotated[int, typer.Option(help="Local tokens attended to, the segment included.")]
SinkTokens = Annotated[int, typer.Option(help="First tokens kept in every layer.")]
SegmentSize = Annotated[int, typer.Option(help="Tokens of a forward call.")]
QueryTokens = Annotated[
    int | None, typer.Option(help="Tokens before a segment that make its query  [default: segment size]")
]
Neighbours = Annotated[int, typer.Option(help="Chunks after a hit that come along, within top-k.")]
MinScore = Annotated[float | None, typer.Option(help="Chunks that score less are not attended to.")]
PositionMode = Annotated[
    str, typer.Option(help="Retrieved keys stand at 'zero', 'overlaid', 'before-window' or 'original'.")
]
MemoryTokens = Annotated[
    int | None, typer.Option(help="Tokens retrieved for a segment, at most, instead of top-k.")
]
ChunkOrder = Annotated[str, typer.Option(help="Retrieved chunks stand by 'position' or by 'score'.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of all that is random.")]
RetrieveEvery = Annotated[
    int | None, typer.Option(help="Tokens generated between retrievals  [default: half a chunk]")
]
Dtype = Annotated[
    str, typer.Option(help="'float32', 'bfloat16', 'float16', or 'auto': what the device computes faster.")
]
Device = Annotated[
    str, typer.Option(help="'cpu', 'cuda', 'cuda:N', 'mps', or 'auto': a GPU where there is one.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that the model brings; read that code first."),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; '-' prints it.")
]


def memory_config(
    backend: str,
    backend_option: list[str] | None,
    retriever: str,
    retriever_option: list[str] | None,
    store: list[str] | None,
    seed: int,
    **settings: Any,
) -> MemoryConfig:
    """Make the configuration that the options ask for.

    Raises
    ------
    InvalidArgumentError
        If an option cannot be used, or needs a backend where there is none.
    """
    from memlong.decoder import MemoryConfig

    if backend == "none":
        plain = MemoryConfig(backend=None)
        given = {
            "--backend-option": bool(backend_option),
            "--retriever-option": bool(retriever_option),
            "--store": bool(store),
        }
        for name in _NEED_A_BACKEND:
            unset = getattr(plain, name)
            given[f"--{name.replace('_', '-')}"] = settings.get(name, unset) != unset
        for option, is_given in given.items():
            if is_given:
                raise InvalidArgumentError(f"{option} goes with a backend, and --backend is 'none'")
    retriever_options = key_values("--retriever-option", retriever_option or [], example="dim=1024")
    if retriever == "random":
        retriever_options.setdefault("seed", seed)
    return MemoryConfig(
        backend=None if backend == "none" else backend,
        backend_options=key_values("--backend-option", backend_option or []),
        retriever=retriever,
        retriever_options=retriever_options,
        store=key_values("--store", store or [], example="host=1GB", as_text={"disk", "dtype"}),
        **settings,
    )
