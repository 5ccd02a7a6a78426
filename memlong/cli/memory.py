"""The options about memory, declared once for all commands that have one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Any, get_type_hints

from memlong.cli import options
from memlong.cli.loading import runs_on
from memlong.plugins.uri import hide_credentials, without_credentials

if TYPE_CHECKING:
    from memlong.decoder import MemoryConfig, MemoryDecoder

Command = Callable[..., None]


@dataclass(frozen=True)
class Memory:
    """What a user typed about the memory; its fields are options of every command made by :func:`with_memory`."""

    backend: options.Backend = "torch"
    backend_option: options.BackendOption = None
    retriever: options.RetrieverName = "lm"
    retriever_option: options.RetrieverOption = None
    store: options.StoreOption = None
    kv_source: options.KvSource = "layer"
    memory_layer: options.MemoryLayer = None
    maps: options.Maps = None
    retrieval_layers: options.RetrievalLayers = "all"
    chunk_size: options.ChunkSize = 128
    top_k: options.TopK = 8
    memory_tokens: options.MemoryTokens = None
    neighbours: options.Neighbours = 0
    min_score: options.MinScore = None
    chunk_order: options.ChunkOrder = "position"
    local_window: options.LocalWindow = 1024
    sink_tokens: options.SinkTokens = 4
    segment_size: options.SegmentSize = 256
    query_tokens: options.QueryTokens = None
    position_mode: options.PositionMode = "zero"

    def config(self, seed: int, **settings: Any) -> MemoryConfig:
        """Make the configuration; ``settings`` are more of its fields.

        Raises
        ------
        InvalidArgumentError
            If an option cannot be used, or needs a backend where there is none.
        """
        return options.memory_config(**asdict(self), seed=seed, **settings)


def with_memory(**defaults: Any) -> Callable[[Command], Command]:
    """Let a command that takes a ``memory`` have the fields of :class:`Memory` as its options instead.

    Parameters
    ----------
    **defaults
        Fields whose default is another one for this command.
    """
    hints = get_type_hints(Memory, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(field.name, field.default),
            annotation=hints[field.name],
        )
        for field in fields(Memory)
    ]

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**given: Any) -> None:
            typed = {parameter.name: given.pop(parameter.name) for parameter in parameters}
            command(memory=Memory(**typed), **given)

        signature = inspect.signature(command, eval_str=True)
        shown: list[inspect.Parameter] = []
        for name, parameter in signature.parameters.items():
            own = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            shown += parameters if name == "memory" else [own]
        run.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
        return run

    return decorate


def described(decoder: MemoryDecoder) -> dict[str, Any]:
    """Return the settings of a decoder for JSON, and what its model runs on."""
    config = decoder.config
    remembers = config.backend is not None
    return {
        **runs_on(decoder.model),
        "backend": without_credentials(config.backend or "none"),
        "backend_options": hide_credentials(config.backend_options),
        "retriever": config.retriever if remembers else None,
        "retriever_options": hide_credentials(config.retriever_options) if remembers else {},
        "kv_source": config.kv_source if remembers else None,
        "memory_layer": config.memory_layer,
        "maps": config.maps,
        "gates": config.gates,
        "retrieval_layers": list(decoder.retrieval_layers) if remembers else [],
        "position_mode": config.position_mode,
        "store": {name: str(value) for name, value in config.store.items()},
        "neighbours": config.neighbours,
        "min_score": config.min_score,
        "memory_tokens": config.memory_tokens,
        "chunk_order": config.chunk_order,
        "chunk_size": config.chunk_size,
        "top_k": config.top_k,
        "local_window": config.local_window,
        "sink_tokens": config.sink_tokens,
        "segment_size": config.segment_size,
        "query_tokens": config.query_length,
    }
