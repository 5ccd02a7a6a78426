"""What a model is made of, found by running it: attention layers, shapes, rotary positions and what else it carries.

There is no list of architectures; a forward pass of a single token, at two positions, tells. With one token, attention
returns that token's value whatever its position, so the hidden states of every layer are the same at both, and the keys
differ by the rotation alone. That finds the rotation, and proves it, layer by layer. What the cache is given is what a
memory can hold; who sees whom is asked of the masks that transformers makes.
"""

from __future__ import annotations

import inspect
import math
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from memlong.decoder.model import attention
from memlong.decoder.model.layout import KvShape, LayerLayout, ModelLayout
from memlong.decoder.model.machine import dtype_name
from memlong.decoder.model.probe_pass import NotingLayer, ProbePass, Reading
from memlong.decoder.model.rope import Angles, LayerRope, possible_ropes
from memlong.errors import UnsupportedModelError

_FAR = 101  # far enough to turn even slow dimensions by more than bfloat16's rounding


def probe(model: PreTrainedModel) -> ModelLayout:
    """Find the attention layers of a RoPE decoder-only model.

    Raises
    ------
    UnsupportedModelError
        If memory cannot be attached to the model; the message says why.
    """
    if isinstance(model, nn.Module) and any(map(_is_compiled, model.modules())):
        raise UnsupportedModelError(
            "The model is compiled (torch.compile), and what memory does between calls would have torch compile it "
            "again and again. Give the model as it was before it was compiled"
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model: load one with AutoModelForCausalLM.from_pretrained"
        )
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise _unsupported(
            model, "it is not a decoder-only language model; load it with AutoModelForCausalLM"
        )
    if getattr(model.config, "return_dict", True) is False:
        raise _unsupported(model, "its config.return_dict is False: set it to True")
    _check_device(model)
    attention.check_free(model)
    try:
        config = attention.text_config(model)
    except ValueError as error:
        raise _unsupported(model, f"it is not clear which of its parts reads text: {error}") from error
    max_positions = _trained_positions(config)
    far = min(_FAR, (max_positions or _FAR + 1) - 1)
    with attention.evaluating(model), attention.replaced_attention(model):
        try:
            seen = ProbePass(model, config, (1, far))
            seen.run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            first = str(error).strip().partition("\n")[0].rstrip(".")
            if isinstance(error, AttributeError) and isinstance(error.obj, NotingLayer):
                raise _unsupported(
                    model,
                    f"its cache is to keep something other than keys, values and states ({error.name})",
                ) from error
            raise _unsupported(
                model,
                f"it does not read a token of text, at a given position, into a cache of keys and values: {first}",
            ) from error
    _check_pass(model, seen)
    found: list[LayerRope] = []
    layers = {
        number: _layer(model, seen, number, seen.readings_of(number), found)
        for number in sorted(seen.written)
    }
    is_unusual = (
        seen.is_unusual
        or config is not model.config  # a part of something larger
        or all(layer.rope.call is None for layer in layers.values())
    )
    if all(layer.rope.call is None for layer in layers.values()) and not _takes_positions(model):
        raise _unsupported(model, "it takes no position_ids, and counts positions by what its cache holds")
    vocabulary = _embeddings(model).shape[0]
    return ModelLayout(
        layers,
        seen.depth,
        seen.readers(),
        seen.states,
        seen.state_shapes(),
        max_positions,
        vocabulary,
        _placeholders(model.config),
        is_unusual,
    )


def _is_compiled(module: nn.Module) -> bool:
    return (
        "_orig_mod" in module._modules  # noqa: SLF001 - a wrapper that torch.compile() made
        or getattr(module, "_compiled_call_impl", None) is not None  # by module.compile()
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    )


def _check_device(model: PreTrainedModel) -> None:
    """Refuse a model that computes on several devices; accelerate may fetch the weights of some layers to the one."""
    places = (getattr(model, "hf_device_map", None) or {}).values()
    named = {f"cuda:{place}" if isinstance(place, int) else str(place) for place in places}
    mapped = named - {"cpu", "disk"}
    held = {str(parameter.device) for parameter in model.parameters()} - {"meta"}
    embeddings = _embeddings(model)
    if len(mapped) <= 1 and len(held) <= 1 and not embeddings.is_meta:
        return
    found = (
        f"on {', '.join(sorted(mapped if len(mapped) > 1 else held))}"
        if len(mapped | held) > 1
        else "offloaded"
    )
    raise _unsupported(
        model,
        f"not all of it is on one device (it is {found}), and memory must be where all layers and the token embeddings "
        "are; load it with device_map={'': 'cuda:0'}, or in a smaller dtype",
    )


def _takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _embeddings(model: PreTrainedModel) -> Tensor:
    try:
        return cast("Tensor", model.get_input_embeddings().weight)
    except (NotImplementedError, AttributeError) as error:
        raise _unsupported(
            model, "it has no one table of token embeddings; give the part of it that reads text"
        ) from error


def _placeholders(config: PreTrainedConfig) -> dict[int, str]:
    found = {}
    for kind in ("image", "video", "audio"):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            token = getattr(config, name, None)
            if isinstance(token, int):
                found[token] = f"{'a' if kind == 'video' else 'an'} {kind}"
    return found


def _trained_positions(config: PreTrainedConfig) -> int | None:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond this it rotates every position in another way
        return cast("int", rope["original_max_position_embeddings"])
    return cast("int | None", getattr(config, "max_position_embeddings", None))


def _check_pass(model: PreTrainedModel, seen: ProbePass) -> None:
    """Refuse what a memory cannot intercept, or cannot continue."""
    for module, name in seen.kept_outside():
        raise _unsupported(
            model,
            f"{type(module).__name__} keeps a state of its own ({name}) outside the cache, where it can be neither "
            "forked nor taken back nor saved",
        )
    if seen.indexed:
        raise _unsupported(
            model, "it chooses which keys to attend to by an index of its own, which knows nothing of memory"
        )
    twice = sorted(number for number, times in seen.written.items() if times > 1)
    if twice:
        raise _unsupported(
            model, f"it goes through layer {twice[0]} several times a token, so that one memory would be many"
        )
    if not seen.written and not seen.readings:
        raise _unsupported(
            model, "it does not attend to keys and values, and so cannot attend to those of a memory"
        )
    unread = sorted(number for number in seen.written if not seen.readings_of(number))
    if not seen.written or unread:
        raise _unsupported(model, "not all of its attention goes through transformers' AttentionInterface")
    for reading in seen.readings:
        if reading.layer is None:
            raise _unsupported(model, f"{type(reading.module).__name__} attends to what is in no K-V cache")
        if reading.mask is not None and reading.visible is None:
            raise _unsupported(
                model,
                f"{type(reading.module).__name__} makes a mask of its own, which knows nothing of memory",
            )
        if reading.bias is not None:
            raise _unsupported(
                model,
                f"{type(reading.module).__name__} adds a bias of its own to the logits of queries and keys "
                f"({reading.bias}), which knows nothing of memory",
            )
        try:
            seen.window_of(reading)
        except ValueError as error:
            raise _unsupported(model, str(error)) from error
    for module, layers in seen.readers().items():
        if len(layers) > 1 and any(not each.is_latest for each in seen.readings if each.module is module):
            raise _unsupported(model, f"one {type(module).__name__} reads the K-V of several layers")


def _layer(
    model: PreTrainedModel,
    seen: ProbePass,
    number: int,
    readings: list[Reading],
    found: list[LayerRope],
) -> LayerLayout:
    first, second = seen.cached(number)
    if not bool(first.isfinite().all() and second.isfinite().all()):
        raise _unsupported(
            model,
            f"keys or values of layer {number} are NaN or infinite, as of weights that are damaged or overflow in "
            f"{dtype_name(model.dtype)}: load it again, or in another dtype",
        )
    module = readings[0].module
    windows = {seen.window_of(reading) for reading in readings}
    heads = {reading.heads for reading in readings}
    if len(windows) > 1:
        raise _unsupported(model, f"the K-V of layer {number} are read through different windows")
    ropes = [_rotation(seen, states, found) for states in (first, second)]
    turns = [rope is None or rope.call is not None for rope in ropes]
    if all(turns):
        raise _unsupported(
            model,
            f"it has no rotary positions (RoPE): both keys and values of layer {number} change with the position, and "
            "cannot be moved to another",
        )
    keys_second = turns[1]
    keys, values, rope = (second, first, ropes[1]) if keys_second else (first, second, ropes[0])
    if rope is None:
        raise _unsupported(
            model, f"the rotation of the keys of layer {number} ({type(module).__name__}) could not be undone"
        )
    if rope.call is not None and all(rope.kind != each.kind for each in found):
        found.insert(0, rope)
    shape = KvShape(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3])
    is_made = any(reading.is_made for reading in readings)
    return LayerLayout(module, rope, max(heads), shape, windows.pop(), keys_second, is_made)


def _rotation(seen: ProbePass, states: Tensor, found: list[LayerRope]) -> LayerRope | None:
    """What makes the states [2, heads, 1, width] at both positions one: a rotation, or none; None if nothing does.

    Rotations of other layers are tried first.
    """
    apart = _apart(states[0], states[1])
    if not apart:
        return LayerRope(None)
    tolerance = max(1e-4, 4 * torch.finfo(states.dtype).eps)
    for rope in found:
        if _apart_undone(rope, states, rope.angles(seen.positions)) <= min(tolerance, apart / 2):
            return rope
    for call, given in seen.rotations():
        for rope in possible_ropes(call, given[0], states.shape[3]):
            if _apart_undone(rope, states, rope.angles(seen.positions)) <= min(tolerance, apart / 2):
                return rope
    return LayerRope(None) if apart <= tolerance else None  # rounding differs from row to row


def _apart_undone(rope: LayerRope, states: Tensor, angles: Angles | None) -> float:
    if angles is None or rope.start + rope.width > states.shape[3]:
        return math.inf
    return _apart(*rope.unrotated(states.float(), angles))


def _apart(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference, relative to that of the first."""
    one, other = one.float(), other.float()
    return float((one - other).norm() / one.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _unsupported(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Memory cannot be attached to {type(model).__name__}: {reason}. Supported are decoder-only models with rotary "
        "positions whose attention is full or slides, on transformers' AttentionInterface; `memlong models` lists them"
    )
