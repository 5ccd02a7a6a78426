"""Checking a model and memory settings against each other, and making what a decoder needs."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel

from memlong.bank import TieredStore
from memlong.bank.warn import warn_caller
from memlong.decoder.config import MemoryConfig
from memlong.decoder.kv.null_chunk import load_null_chunk
from memlong.decoder.kv.sources import make_source
from memlong.decoder.model.attention import attention_of
from memlong.decoder.model.gates import make_gates
from memlong.decoder.model.layer_names import parse_layers
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.model.probe import probe
from memlong.decoder.model.trial import try_out
from memlong.decoder.pages.attention import why_not_compiled
from memlong.decoder.persistence.fingerprint import query_facts
from memlong.decoder.retrievers.base import Retriever
from memlong.decoder.retrievers.create import check_made_for, create_retriever
from memlong.decoder.retrievers.query_map import load_query_map
from memlong.decoder.setup import Setup
from memlong.decoder.stream.positions import with_positions
from memlong.errors import InvalidArgumentError, UnsupportedModelError
from memlong.plugins import Registry
from memlong.plugins.registry import installed_registry


def prepare(
    model: PreTrainedModel,
    tokenizer: Any,
    config: MemoryConfig | None,
    retriever: Retriever | None,
    registry: Registry | None,
) -> Setup:
    """Return the parts of a decoder; arguments and errors are those of `MemoryDecoder`."""
    config = MemoryConfig() if config is None else config
    _check_types(tokenizer, config, retriever)
    check_made_for(retriever, model)
    registry = registry or installed_registry()
    model_layout = probe(model)
    if model_layout.is_unusual:
        try_out(model, model_layout, registry)
    layers = parse_layers(
        str(config.retrieval_layers), model_layout.full_attention_layers, model_layout.layers
    )
    config = with_positions(config, model_layout, layers)
    like = cast("Tensor", model.get_input_embeddings().weight)
    source = make_source(config, model_layout, layers, like)
    layers = source.retrieval_layers  # those with retrieval heads
    blocks = source.block_layout(config.chunk_size, model.dtype, model.device)
    source.null_chunk = load_null_chunk(config, source, blocks)
    gates = make_gates(config, model_layout, layers, like)
    if config.attended_tokens is not None:
        _check_pages(model, model_layout, layers, like)
    if config.backend is not None:
        registry.load_backend_class(config.backend)  # report a missing library now
        if config.store:
            TieredStore(**config.store).check_device(model.device)
        if retriever is None:
            retriever = create_retriever(
                config.retriever, model, tokenizer, config.retriever_options, registry
            )
    if config.answer_cutoff and retriever is not None and retriever.metric == "l2":
        raise InvalidArgumentError(
            f"answer_cutoff must be 0 with {type(retriever).__name__}, got {config.answer_cutoff:g}: it is a share of "
            "the best similarity, and this retriever compares by distance ('l2')"
        )
    query_map = None
    if config.query_map is not None and retriever is not None:
        query_map = load_query_map(config.query_map, retriever, query_facts(config, retriever, model))
    setup = Setup(model, model_layout, config, layers, source, gates, retriever, registry, query_map)
    bank = setup.new_bank()  # checks a backend's options and its capacity, too
    if bank is not None:
        bank.check_layout(setup.block_layout)
    return setup


def _check_pages(
    model: PreTrainedModel, model_layout: ModelLayout, layers: tuple[int, ...], like: Tensor
) -> None:
    attention = attention_of(model)
    if attention != "sdpa":
        advice = "load it with attn_implementation='sdpa', or " if model._supports_sdpa else ""  # noqa: SLF001
        raise UnsupportedModelError(
            f"attended_tokens must be None for this {type(model).__name__}, which attends by {attention!r}: {advice}"
            "leave it out"
        )
    reason = why_not_compiled(model_layout, layers, like)
    if reason is not None:
        warn_caller(
            f"attended_tokens saves no time: {reason}. Pages are chosen all the same, and attended to through masks"
        )


def _check_types(tokenizer: Any, config: Any, retriever: Any) -> None:
    if not isinstance(config, MemoryConfig):
        raise InvalidArgumentError(f"config must be a MemoryConfig, got {config!r}")
    if isinstance(tokenizer, MemoryConfig | Retriever | str):
        raise InvalidArgumentError(
            f"tokenizer must be the model's tokenizer, or None, got {tokenizer!r:.80}: the config comes after it"
        )
    if retriever is not None and not isinstance(retriever, Retriever):
        raise InvalidArgumentError(
            f"retriever must be a Retriever, got {retriever!r}: its name goes into the MemoryConfig"
        )
