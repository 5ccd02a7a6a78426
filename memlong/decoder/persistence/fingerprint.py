"""What stored keys and values depend on: they are meaningless to any other model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from memlong.decoder.config import MemoryConfig
from memlong.decoder.kv.sources import LatentSource, LayerSource
from memlong.decoder.model.layer_names import heads_as_text
from memlong.decoder.model.weights import (
    adapter_digests,
    module_digest,
    text_decoder,
    weights_digest,
    weights_sample,
)
from memlong.decoder.retrievers.base import Retriever
from memlong.decoder.setup import Setup
from memlong.uri import digested

_DIGITS = 64  # of a SHA-256

_SAYS_NOTHING = {  # of a text configuration: names, and what decides how a model is run, trained or made
    "architectures",
    "auto_map",
    "chunk_size_feed_forward",
    "dtype",
    "final_logit_softcapping",
    "is_decoder",
    "logit_scale",
    "logits_scaling",
    "num_logits_to_keep",
    "output_router_logits",
    "pretraining_tp",
    "problem_type",
    "quantization_config",
    "return_dict",
    "tie_word_embeddings",
    "torch_dtype",
}
_OF_TRAINING = {"aux", "dropout", "init", "initializer", "jitter", "layerdrop", "loss", "pdrop"}
_OF_OTHERS = ("_", "audio_", "classifier_", "id2label", "label2id", "num_labels", "summary_", "vision_")
_OF_TOKENS = ("_token_id", "_token_index")
_UNSAID = {"retrieval_heads": "all", "null_chunk": None, "adapter_for": "all", "embedding_overlap": 0}
"""What it means if a fingerprint does not say."""

_SIZES = ("chunk_size", "local_window", "sink_tokens", "segment_size", "position_mode")


def fingerprint(setup: Setup) -> dict[str, Any]:
    """Describe, as JSON can hold it, everything that keys, values and embeddings of a memory depend on.

    Every byte of the weights is hashed. While the same tensors stay in place, they are read once, and then a sample of
    each.
    """
    model, config, source, gates = setup.model, setup.config, setup.source, setup.gates
    part = text_decoder(model, setup.model_layout.modules)
    adapters = adapter_digests(model, part)
    return {
        "model": type(part).__name__,
        "config": _told(model.config.get_text_config(decoder=True)),
        "weights": weights_digest(model, part),
        "adapters": adapters,
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": len(setup.model_layout.layers),
        "retrieval_layers": list(source.retrieval_layers),
        "kv_source": config.kv_source,
        "memory_layers": list(source.memory_layers) if isinstance(source, LayerSource) else None,
        "maps": module_digest(source.maps) if isinstance(source, LatentSource) else None,
        "gates": None if gates is None else module_digest(gates),
        "retriever": None if setup.retriever is None else retriever_facts(config, setup.retriever),
        **{name: getattr(config, name) for name in _SIZES},
        **_unusual(setup, adapters),
        **({} if source.null_chunk is None else {"null_chunk": module_digest(source.null_chunk)}),
    }


def origin_of(setup: Setup) -> dict[str, Any]:
    """Describe what the chunks of a bank depend on, in a few milliseconds: a sample of the weights is hashed."""
    model, config, source = setup.model, setup.config, setup.source
    part = text_decoder(model, setup.model_layout.modules)
    adapters = adapter_digests(model, part)
    return {
        "model": type(part).__name__,
        "config": _told(model.config.get_text_config(decoder=True)),
        "weights": weights_sample(part),
        "adapters": adapters,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_source": config.kv_source,
        "stored_layers": list(source.stored_layers),
        "maps": module_digest(source.maps) if isinstance(source, LatentSource) else None,
        "retriever": None if setup.retriever is None else retriever_facts(config, setup.retriever),
        **_unusual(setup, adapters),
    }


def _unusual(setup: Setup, adapters: Mapping[str, str]) -> dict[str, str | int]:
    """Return what is said only where it differs from `_UNSAID`, of facts that a bank depends on as well."""
    heads, config = setup.source.heads, setup.config
    found: dict[str, str | int] = {} if heads is None else {"retrieval_heads": heads_as_text(heads)}
    if config.adapter_for != "all" and adapters:
        found["adapter_for"] = config.adapter_for
    if config.overlap_length and setup.retriever is not None:
        found["embedding_overlap"] = config.overlap_length
    return found


def facts(told: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield the facts of a fingerprint one by one, with nested names joined by dots."""
    for name, value in told.items():
        yield from _leaves(name, value)


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return which parts of two fingerprints differ, with their values where they are readable.

    Only configuration fields that both have are compared: a release of transformers may add some. Weights of different
    dtypes cannot be compared.
    """
    adapters = theirs.get("adapters") or {}
    is_known = isinstance(theirs.get("config"), dict) and isinstance(adapters, dict)
    if not is_known or not all(isinstance(each, str) for each in adapters.values()):
        return ["the form of the fingerprint, which is of an earlier memlong and cannot be compared"]
    names = (ours.keys() | theirs.keys()) - {"adapters", "config"}
    if ours.get("dtype") != theirs.get("dtype"):
        names -= {"weights"}
    found = [
        _told_apart(name, *(told.get(name, _UNSAID.get(name)) for told in (ours, theirs)))
        for name in sorted(names)
    ]
    fields = [
        _told_apart(name, ours["config"][name], theirs["config"][name])
        for name in sorted(ours["config"].keys() & theirs["config"].keys())
    ]
    mine = ours.get("adapters") or {}
    differ = sorted(mine.values()) != sorted(adapters.values())
    told = f"adapters ({_names(adapters)} when it was saved, {_names(mine)} now)" if differ else ""
    return [each for each in (told, *fields, *found) if each]


def _told_apart(name: str, mine: object, other: object) -> str:
    if mine == other:
        return ""
    is_digest = any(isinstance(each, str) and len(each) == _DIGITS for each in (mine, other))
    return name if is_digest else f"{name} ({other!r} when it was saved, {mine!r} now)"


def _names(adapters: Mapping[str, str]) -> str:
    """Name adapters so that two of the same name with different weights differ."""
    return ", ".join(f"{name!r} {digest[:8]}" for name, digest in sorted(adapters.items())) or "none"


def _told(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a text configuration that keys and values may depend on, nested names joined by dots."""
    silent = _SAYS_NOTHING | (GenerationConfig().to_dict().keys() - {"top_k"})  # which may be that of experts
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(each) for name, each in _leaves("", rope) if name.endswith("rope_type")}
    if kinds <= {"default"}:  # only other kinds of rotation ask how long the model's texts may be
        silent |= {"max_position_embeddings"}
    settings = {
        name: value
        for name, value in config.to_dict().items()
        if name not in silent
        and not name.startswith(_OF_OTHERS)
        and not name.endswith(_OF_TOKENS)
        and not _OF_TRAINING & set(name.split("_"))
    }
    plain = json.loads(json.dumps(settings, default=str), parse_constant=str)  # a limit may be infinite
    return dict(_leaves("", plain))


def _leaves(name: str, value: object) -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict):
        yield name, value
        return
    for key in sorted(value, key=str):
        yield from _leaves(f"{name}.{key}" if name else str(key), value[key])


def query_facts(config: MemoryConfig, retriever: Retriever, model: PreTrainedModel) -> list[object]:
    """Describe what a query map is made for: the retriever, and how many tokens the model knows."""
    return [
        *retriever_facts(config, retriever),
        int(cast("Tensor", model.get_input_embeddings().weight).shape[0]),
    ]


def retriever_facts(config: MemoryConfig, retriever: Retriever) -> list[object]:
    """Describe, as JSON can hold it, what the embeddings of chunks depend on besides the model."""
    kind = type(retriever)
    silent = {"device", *retriever.query_options}
    options = {
        name: value
        for name, value in config.retriever_options.items()
        if name not in silent and not name.endswith(".device")  # of one that a hybrid fuses
    }
    said = json.dumps(digested(options), sort_keys=True, default=str)
    return [f"{kind.__module__}:{kind.__qualname__}", config.retriever, said, retriever.dim, retriever.metric]
