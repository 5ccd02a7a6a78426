"""Hashing the weights that make keys and values, wherever they are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlong.decoder.model.adapters import active_layers, own_names
from memlong.errors import UnsupportedModelError

_SAMPLE = 256
_hashed: WeakKeyDictionary[nn.Module, tuple[object, str]] = WeakKeyDictionary()


def text_decoder(model: PreTrainedModel, attention: Iterable[nn.Module]) -> nn.Module:
    """Return the part of a model that makes keys and values of text: without vision tower or LM head.

    Parameters
    ----------
    model
        A transformers model.
    attention
        Its attention modules; where not all of them are in a part that transformers names, it is the whole model.
    """
    needed = {id(module) for module in (*attention, model.get_input_embeddings())}
    for part in (cast("nn.Module", model.get_decoder()), model.base_model):
        if needed <= {id(module) for module in part.modules()}:
            return part
    return model


def weights_digest(model: PreTrainedModel, part: nn.Module) -> str:
    """Hash every byte of a part's own weights, without adapters.

    While the same tensors stay in place, they are read once, and then a sample of each.

    Raises
    ------
    UnsupportedModelError
        If weights are on torch's meta device without being offloaded by accelerate.
    """
    prefix, state = _prefix(model, part), _state_of(part)
    own = {plain: name for name, plain in own_names(part, state).items()}

    def numbers() -> Iterator[tuple[str, Tensor]]:  # one at a time: what is on disk may not fit into memory
        for plain, name in sorted(own.items()):
            yield from _plain({plain: true_tensor(model, f"{prefix}{name}", state[name])})

    held = [tensor for name in own.values() for _, tensor in _plain({name: state[name]})]
    if any(tensor.is_inference() for tensor in held):  # nobody counts how often these were changed
        return digest_of(numbers())
    places = [(tensor.data_ptr(), tensor._version) for tensor in held]  # noqa: SLF001 - no other name
    # The sample sees most of what goes around the count, as .data does.
    seen = (places, digest_of(numbers(), _SAMPLE))
    known = _hashed.get(model)
    if known is None or known[0] != seen:
        known = _hashed[model] = (seen, digest_of(numbers()))
    return known[1]


def weights_sample(part: nn.Module) -> str:
    """Hash a sample of each of a part's own weights, in milliseconds; of offloaded ones, names and shapes."""
    state = _state_of(part)
    own = {plain: state[name] for name, plain in own_names(part, state).items()}
    return digest_of(_plain(dict(sorted(own.items()))), _SAMPLE)


def adapter_digests(model: PreTrainedModel, part: nn.Module) -> dict[str, str]:
    """Hash weights and scaling of each active adapter in a part of a model, regardless of its name."""
    digests: dict[str, Any] = {}
    prefix = _prefix(model, part)
    for each in active_layers(part):
        digest = digests.setdefault(each.adapter, hashlib.sha256())
        digest.update(f"{each.layer} {each.scaling}".encode())
        for name, tensor in each.tensors.items():
            nameless = ".".join(part for part in name.split(".") if part != each.adapter)
            true = true_tensor(model, f"{prefix}{each.path}.{name}", tensor)
            digest.update(digest_of([(nameless, true)]).encode())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def digest_of(tensors: Iterable[tuple[str, Tensor]], most: int | None = None) -> str:
    """Hash all numbers of each tensor, or at most ``most`` evenly spaced ones, including the first and the last."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.is_meta:
            continue
        flat = tensor.detach().flatten()
        if most is not None and len(flat) > most:
            places = torch.linspace(0, len(flat) - 1, most, dtype=torch.float64, device="cpu").long()
            flat = flat[places.to(flat.device)]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def left_as_they_are(module: nn.Module) -> Iterator[None]:
    """Keep ``state_dict()`` from changing a module's weights.

    On a CPU, bitsandbytes 0.50 repacks 4-bit weights for computing, unpacks them in place for a state_dict, and
    loses the order of their scales in doing so: the model then computes something else.
    """
    quantized: Iterable[Any] = (getattr(each, "quant_state", None) for each in module.parameters())
    packed = [each for each in quantized if getattr(each, "packing_format_for_cpu", False)]
    for each in packed:
        each.packing_format_for_cpu = False
    try:
        yield
    finally:
        for each in packed:
            each.packing_format_for_cpu = True


def true_tensor(model: nn.Module, name: str, value: Any) -> Any:
    """Return a tensor of a model's state; one that accelerate has offloaded, from where it is kept.

    Raises
    ------
    UnsupportedModelError
        If it is on torch's meta device, and nobody keeps it, or if it is divided among processes.
    """
    if hasattr(value, "full_tensor"):  # torch's DTensor
        raise UnsupportedModelError(
            f"The weights {name} of this {type(model).__name__} are divided among processes, so that its memory could "
            "not be matched to it. Load the trained decoder from its folder: MemoryDecoder.from_pretrained(folder)"
        )
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    parts = name.split(".")
    for depth in reversed(range(len(parts))):
        hook = getattr(model.get_submodule(".".join(parts[:depth])), "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            kept = getattr(each, "weights_map", None)
            try:
                if kept is not None:
                    return kept[".".join(parts[depth:])]
            except KeyError:
                continue
    raise UnsupportedModelError(
        f"The weights {name} of this {type(model).__name__} are on torch's meta device, so that its memory could not "
        "be matched to it. Load the model with its weights, or let accelerate offload them"
    )


def module_digest(module: nn.Module) -> str:
    """Hash every byte of a module's state; what it is trained as, by a parametrization, makes no difference."""
    made = getattr(module, "parametrizations", {})
    state = {
        name: each for name, each in _state_of(module).items() if not name.startswith("parametrizations.")
    }
    state |= {name: getattr(module, name).detach() for name in made}
    return digest_of(_plain(dict(sorted(state.items()))))


def _state_of(module: nn.Module) -> dict[str, Any]:
    with left_as_they_are(module):
        return module.state_dict()


def _plain(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a state; of one that is made of others, as torchao's quantized ones are, those."""
    for name, value in state.items():
        if hasattr(value, "__tensor_flatten__"):
            parts, _ = value.__tensor_flatten__()
            yield from _plain({f"{name}.{part}": getattr(value, part) for part in parts})
        elif isinstance(value, Tensor):
            yield name, value


def _prefix(model: nn.Module, part: nn.Module) -> str:
    path = next(path for path, module in model.named_modules() if module is part)
    return f"{path}." if path else ""
