"""What a file says of an adapter, checked: a LoRA whose layers and ranks are those of its tensors.

Settings that would have peft run a pattern over all names, change the base weights, replace layers, or import a module
are not taken from a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from memlong.decoder.model.adapters import HARMLESS_STARTS

Shapes = Mapping[str, tuple[int, ...]]

_SETTLED = {  # by the tensors, or of no account when a trained adapter is loaded
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
}
_FLAGS = ("use_rslora", "use_dora", "fan_in_fan_out")
_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "alpha_pattern",
    "init_lora_weights",
    "bias",
    *_FLAGS,
}
_PREFIX = "base_model.model."
_TENSOR = re.compile(
    r"(?P<layer>.+)\.(lora_(?P<part>A|B)\.weight|lora_embedding_(?P<of_embedding>A|B)|lora_magnitude_vector(\.weight)?)"
)
_PLAIN = re.compile(r"[\w.-]{1,512}")


def unreadable_lora(settings: Mapping[str, Any]) -> str:
    """Say what of an adapter's settings is not taken from a file; nothing if all of it is fine."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        return f"it is of the kind {kind!r}, and a decoder's folder holds a LoRA"
    for name, value in settings.items():
        if name not in _SETTLED | _READ and value:
            return f"its {name} is {_shown(value)}, which is not taken from a file"
    start = settings.get("init_lora_weights", True)
    if not isinstance(start, bool | str | None) or start not in HARMLESS_STARTS:
        return f"its init_lora_weights is {_shown(start)}, which changes the weights of the model itself"
    if settings.get("bias", "none") != "none":
        return f"its bias must be 'none', got {_shown(settings['bias'])}"
    for name in _FLAGS:
        if not isinstance(settings.get(name, False), bool):
            return f"its {name} must be true or false, got {_shown(settings[name])}"
    alphas = settings.get("alpha_pattern") or {}
    if not isinstance(alphas, dict) or not all(_PLAIN.fullmatch(name) for name in alphas):
        return f"its alpha_pattern must be names of layers, without patterns, got {_shown(alphas)}"
    numbers = {"lora_alpha": settings.get("lora_alpha", 8), **{f"alpha of {k}": v for k, v in alphas.items()}}
    for name, value in numbers.items():
        if type(value) not in (int, float) or not abs(value) < 1e9:
            return f"its {name} must be a number, got {_shown(value)}"
    dropout = settings.get("lora_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        return f"its lora_dropout must be a number from 0 to 1, got {_shown(dropout)}"
    return ""


def lora_options(
    settings: Mapping[str, Any], shapes: Shapes, layers: Collection[str], most: int, widest: int
) -> dict[str, Any]:
    """Return the arguments of peft's ``LoraConfig`` for the tensors of an adapter.

    Parameters
    ----------
    settings
        What ``adapter_config.json`` holds, found good by `unreadable_lora`.
    shapes
        Those of the tensors, by name.
    layers
        Names of the model's modules.
    most
        How many numbers it may have.
    widest
        How many the model has of a token.

    Raises
    ------
    ValueError
        If the tensors are of no LoRA of such a model.
    """
    ranks: dict[str, int] = {}
    for name, shape in shapes.items():
        found = _TENSOR.fullmatch(name.removeprefix(_PREFIX))
        if found is None or found["layer"] not in layers:
            raise ValueError(f"its tensor {_shown(name)} belongs to no layer of the model")
        if "A" in (found["part"], found["of_embedding"]):
            ranks[found["layer"]] = shape[0] if shape else 0
    count = sum(math.prod(shape) for shape in shapes.values())
    if count > most or not ranks or not all(rank >= 1 for rank in ranks.values()):
        raise ValueError(f"its {len(shapes)} tensors must have 1 to {most:,} numbers, got {count:,}")
    if max(ranks.values()) > widest:
        raise ValueError(
            f"its rank is {max(ranks.values()):,}, more than the {widest:,} numbers that a token has"
        )
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    if not settings.get("rank_pattern") and set(ranks.values()) != {settings.get("r", 8)}:
        raise ValueError(f"its r is {_shown(settings.get('r'))}, but its tensors are of rank {rank}")
    return {
        "r": rank,
        "target_modules": sorted(ranks),
        "rank_pattern": {re.escape(name): each for name, each in ranks.items() if each != rank},
        "lora_alpha": settings.get("lora_alpha", 8),
        "alpha_pattern": _alphas(settings.get("alpha_pattern") or {}, ranks),
        "lora_dropout": settings.get("lora_dropout", 0.0),
        **{name: settings.get(name, False) for name in _FLAGS},
    }


def _alphas(given: Mapping[str, float], layers: Collection[str]) -> dict[str, float]:
    """Alphas by the whole names of layers: peft tries every pattern on every layer, and the first that fits counts."""
    order = {name: number for number, name in enumerate(given)}
    found = {}
    for layer in layers:
        parts = layer.split(".")
        ends = {".".join(parts[start:]) for start in range(len(parts))} & order.keys()
        if ends:
            found[layer] = given[min(ends, key=order.__getitem__)]
    return found


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
