"""What stored keys and values depend on: without the same model, they mean nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlong.decoder.config import MemoryConfig
from memlong.decoder.gates import MemoryGates
from memlong.decoder.layout import ModelLayout
from memlong.decoder.retrievers.base import Retriever
from memlong.decoder.sources import KvSource, LatentSource, LayerSource

_SAMPLE = 256
_hashed: WeakKeyDictionary[PreTrainedModel, tuple[object, str]] = WeakKeyDictionary()
_SAYS_NOTHING = {  # of a model's config: names, and what decides how it is run
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "quantization_config",
}
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings", "partial_rotary_factor")
_SIZES = ("chunk_size", "local_window", "sink_tokens", "segment_size", "position_mode")


def fingerprint(
    model: PreTrainedModel,
    config: MemoryConfig,
    layout: ModelLayout,
    source: KvSource,
    gates: MemoryGates | None,
    retriever: Retriever | None,
) -> dict[str, Any]:
    """Describe, as JSON can hold it, all that keys, values and embeddings of a memory depend on.

    Of the weights, every byte is. While the same tensors stay in place, they are read once, and then a sample of each.
    """
    settings = model.config.to_dict()
    rest = {
        name: value for name, value in settings.items() if name not in _SAYS_NOTHING and name not in _ROPE
    }
    return {
        "model": type(model).__name__,
        "config": _digest(rest),
        "rope": _digest({name: settings.get(name) for name in _ROPE}),
        "weights": _weights(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": len(layout.layers),
        "retrieval_layers": list(source.retrieval_layers),
        "kv_source": config.kv_source,
        "memory_layers": list(source.memory_layers) if isinstance(source, LayerSource) else None,
        "maps": _module(source.maps) if isinstance(source, LatentSource) else None,
        "gates": None if gates is None else _module(gates),
        "retriever": None if retriever is None else _retriever(config, retriever),
        **{name: getattr(config, name) for name in _SIZES},
    }


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return which parts of two fingerprints differ, with what they are where that says something.

    Of other dtypes, weights cannot be compared.
    """
    found = []
    names = ours.keys() | theirs.keys()
    if ours.get("dtype") != theirs.get("dtype"):
        names -= {"weights"}
    for name in sorted(names):
        mine, other = ours.get(name), theirs.get(name)
        if mine != other:
            is_digest = any(isinstance(each, str) and len(each) == 64 for each in (mine, other))
            found.append(name if is_digest else f"{name} ({other!r} when it was saved, {mine!r} now)")
    return found


def _retriever(config: MemoryConfig, retriever: Retriever) -> list[object]:
    kind = type(retriever)
    options = {name: value for name, value in config.retriever_options.items() if name != "device"}
    said = json.dumps(options, sort_keys=True, default=str)
    return [f"{kind.__module__}:{kind.__qualname__}", config.retriever, said, retriever.dim, retriever.metric]


def _weights(model: PreTrainedModel) -> str:
    tensors = _tensors(model)
    if any(
        tensor.is_inference() for tensor in tensors.values()
    ):  # nobody counts how often these were changed
        return _module(model)
    places = [(tensor.data_ptr(), tensor._version) for tensor in tensors.values()]  # noqa: SLF001 - no other name
    state = (
        places,
        _digest_of(tensors, _SAMPLE),
    )  # the sample sees most of what goes around the count, as .data does
    known = _hashed.get(model)
    if known is None or known[0] != state:
        known = _hashed[model] = (state, _module(model))
    return known[1]


def _module(module: torch.nn.Module) -> str:
    return _digest_of(_tensors(module))


def _tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: each for name, each in sorted(module.state_dict().items()) if isinstance(each, Tensor)}


def _digest_of(tensors: Mapping[str, Tensor], most: int | None = None) -> str:
    """Hash all numbers of each tensor, or so many that are evenly spaced, the first and the last among them."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
        if most is not None and len(flat) > most:
            places = torch.linspace(0, len(flat) - 1, most, dtype=torch.float64).long()
            flat = flat[places.to(flat.device)]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
