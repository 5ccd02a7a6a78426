"""What a model is made of, found by running it: attention layers, shapes and rotary positions.

There is no list of architectures; a forward pass of a single token tells. With one token, attention returns that
token's value whatever its position, so the hidden states of every layer are the same at any position, and the keys
of two such passes differ by the rotation alone. That finds the rotation, and proves it, layer by layer.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from memlong.decoder import attention
from memlong.decoder.kernels import Attend, Output
from memlong.decoder.rope import AngleCache, Angles, LayerRope, RotaryCall
from memlong.errors import UnsupportedModelError

_FAR = 101  # far enough to turn even slow dimensions by more than bfloat16's rounding
_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class LayerLayout:
    """One attention layer; ``sliding_window`` is None for full attention."""

    module: nn.Module
    rope: LayerRope
    heads: int
    kv_heads: int
    head_dim: int
    sliding_window: int | None


@dataclass(frozen=True)
class ModelLayout:
    """The attention layers of a model, in order, its number of positions, and that of its tokens.

    ``max_positions`` are those that it was trained on, under one and the same rotation.
    """

    layers: tuple[LayerLayout, ...]
    max_positions: int | None
    vocabulary: int

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The attention modules."""
        return tuple(layer.module for layer in self.layers)

    @property
    def full_attention_layers(self) -> tuple[int, ...]:
        """Layers without a sliding window; all layers, where every one has such a window."""
        full = tuple(index for index, layer in enumerate(self.layers) if layer.sliding_window is None)
        return full or tuple(range(len(self.layers)))


def probe(model: PreTrainedModel) -> ModelLayout:
    """Find the attention layers of a RoPE decoder-only model.

    Raises
    ------
    UnsupportedModelError
        If it is no such model, saying what is missing.
    """
    if isinstance(model, nn.Module) and any(map(_is_compiled, model.modules())):
        raise UnsupportedModelError(
            "The model is compiled (torch.compile), and what memory does between calls would have torch compile it "
            "again and again. Give the model as it was before it was compiled."
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no transformers model. Load one with AutoModelForCausalLM.from_pretrained(...)."
        )
    config = model.config
    if getattr(config, "is_encoder_decoder", False) or not model.can_generate():
        raise _unsupported(
            model, "it is not a decoder-only language model; load it with AutoModelForCausalLM"
        )
    _check_device(model)
    odd = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if odd:
        raise _unsupported(model, f"it has layers of type {', '.join(sorted(odd))}")
    attention.check_free(model)
    max_positions = _trained_positions(config)
    with attention.evaluating(model), attention.replaced_attention(model):
        first = _SingleTokenPass.run(model, 1)
        second = _SingleTokenPass.run(model, min(_FAR, (max_positions or _FAR + 1) - 1))
    count = len(first.layers)
    if not count or sorted(first.layers) != list(range(count)):
        raise _unsupported(model, "not all of its attention goes through transformers' AttentionInterface")
    if not first.embeddings:
        raise _unsupported(model, "it has no rotary positions (RoPE), without which keys cannot be moved")
    layers = tuple(_layer(model, first, second, index) for index in range(count))
    if len({(layer.kv_heads, layer.head_dim) for layer in layers}) > 1:
        raise _unsupported(model, "its layers differ in the number or the size of their K-V heads")
    vocabulary = cast("Tensor", model.get_input_embeddings().weight).shape[0]
    return ModelLayout(layers, max_positions, vocabulary)


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
    embeddings = cast("Tensor", model.get_input_embeddings().weight)
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


def _trained_positions(config: PreTrainedConfig) -> int | None:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond this it rotates every position in another way
        return cast("int", rope["original_max_position_embeddings"])
    return cast("int | None", getattr(config, "max_position_embeddings", None))


@dataclass
class _SingleTokenPass(attention.AttentionSlot):
    """What a pass of one token at one position showed, by layer."""

    position: int
    layers: dict[int, tuple[nn.Module, int | None]] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, int] = field(default_factory=dict)
    embeddings: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    calls: list[tuple[RotaryCall, Tensor]] = field(default_factory=list)

    @classmethod
    def run(cls, model: PreTrainedModel, position: int) -> _SingleTokenPass:
        seen = cls(position)
        layered = [
            module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)
        ]
        token = (
            0 if model.config.pad_token_id != 0 else 1
        )  # a padding token embeds as zero, which shows nothing
        device = model.get_input_embeddings().weight.device
        with ExitStack() as stack:
            for module in layered:
                hook = module.register_forward_pre_hook(seen._note_embeddings, with_kwargs=True)
                stack.callback(hook.remove)
            for module in model.modules():
                if type(module).__name__.endswith("RotaryEmbedding"):
                    stack.callback(module.register_forward_hook(seen._note_rotation, with_kwargs=True).remove)
            stack.enter_context(attention.installed(seen, layered))
            stack.enter_context(torch.no_grad())
            try:
                model(
                    input_ids=torch.full((1, 1), token, device=cast("torch.device", device)),
                    position_ids=torch.full((1, 1), position, device=cast("torch.device", device)),
                    past_key_values=DynamicCache(),
                    use_cache=True,
                )
            except (TypeError, AttributeError, KeyError, IndexError) as error:
                raise _unsupported(
                    model, f"it does not run a single token at a given position: {error}"
                ) from error
        return seen

    def attend(
        self,
        base: Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> Output:
        self.layers[module.layer_idx] = (module, options.get("sliding_window"))  # type: ignore[index]
        self.keys[module.layer_idx] = key  # type: ignore[index]
        self.heads[module.layer_idx] = query.shape[1]  # type: ignore[index]
        return base(module, query, key, value, attention_mask, **options)

    def _note_embeddings(self, module: nn.Module, _: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("position_embeddings")
        if given is not None:
            self.embeddings[module.layer_idx] = given  # type: ignore[index]

    def _note_rotation(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, Tensor]
    ) -> None:
        call = RotaryCall.record(module, args, kwargs)
        if call.replayable:
            self.calls.append((call, output[0]))

    def angles(self, rope: LayerRope) -> Angles | None:
        """Angles at this pass's position."""
        return AngleCache(torch.tensor([[self.position]], device=self.keys[0].device)).of(rope)

    def call_of(self, index: int) -> RotaryCall | None:
        """The rotary call whose angles this layer was given."""
        cos = self.embeddings[index][0] if index in self.embeddings else None
        return next((call for call, output in self.calls if output is cos), None)


def _layer(
    model: PreTrainedModel, first: _SingleTokenPass, second: _SingleTokenPass, index: int
) -> LayerLayout:
    module, sliding_window = first.layers[index]
    one, other = first.keys[index], second.keys[index]
    layer = partial(
        LayerLayout,
        module,
        heads=first.heads[index],
        kv_heads=one.shape[1],
        head_dim=one.shape[3],
        sliding_window=sliding_window,
    )
    if torch.equal(one, other):  # not rotated: the very same computation
        return layer(LayerRope(None))
    for rope in _rotations(module, first.call_of(index), one.shape[3]):
        try:
            raw = [rope.unrotate(seen.keys[index].float(), seen.angles(rope)) for seen in (first, second)]
        except RuntimeError:  # this width does not fit the angles, or no query is one too few
            continue
        if _alike(raw[0], raw[1], one.dtype):
            return layer(_simplified(rope, first.angles(rope)))
    raise _unsupported(
        model, f"the rotation of the keys of layer {index} ({type(module).__name__}) could not be undone"
    )


def _rotations(module: nn.Module, call: RotaryCall | None, head_dim: int) -> list[LayerRope]:
    """Ways in which this layer may rotate: over the width of the angles, or over twice that (half angles)."""
    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if call is None or apply is None:
        return []
    given: Tensor = call.arguments["position_ids"]
    width = call.angles(given)[0].shape[-1]
    widths = [size for size in (width, 2 * width) if size <= head_dim]
    return [LayerRope(call, apply, size, stand_ins) for size in widths for stand_ins in (0, 1)]


def _simplified(rope: LayerRope, angles: Angles | None) -> LayerRope:
    """Return the rotation in halves if it is one: then it gives what the model's own function gives."""
    assert angles is not None  # noqa: S101 - it rotates
    if rope.width % 2 or angles[0].shape[-1] != rope.width:
        return rope
    probes = torch.eye(rope.width, device=angles[0].device)[None, :, None]  # a head for each dimension
    simple = replace(rope, in_halves=True)
    return (
        simple
        if torch.allclose(simple.rotate(probes, angles), rope.rotate(probes, angles), atol=1e-6)
        else rope
    )


def _alike(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    tolerance = max(1e-4, 4 * torch.finfo(dtype).eps)
    return bool((one - other).norm() <= tolerance * one.norm())


def _unsupported(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Memory cannot be attached to {type(model).__name__}: {reason}. Supported are RoPE decoder-only models with "
        "full or sliding-window attention on transformers' AttentionInterface (Llama, Qwen, Mistral, Gemma, Phi, "
        "GPT-NeoX and most others)."
    )
