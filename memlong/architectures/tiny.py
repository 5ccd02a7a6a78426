"""A tiny random model of every decoder-only architecture that the installed transformers has.

There is no list of architectures: each is what transformers makes by default, shrunk by the names of its settings. What
the rules do not get right stands in `_EXCEPTIONS`. A model type that transformers adds is there by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

VOCABULARY = 97

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_LAYERS = 4
_HIDDEN, _HEADS, _HEAD_DIM = 64, 4, 16
_WINDOW = 40
_POSITIONS = 512
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "_pad_token_id": 0, "sep_token_id": 2}
_UNTOUCHED = frozenset({"id2label", "label2id", "dtype", "transformers_version", "model_type", "architectures"})


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


_RULES: tuple[tuple[str, Callable[[int], int]], ...] = (
    # The first that matches the whole name of a setting decides what becomes of its number.
    (r"(vocab_size|unpadded_vocab_size|vocab_size_per_layer_input)", lambda _: VOCABULARY),
    (r"(num_hidden_layers|num_layers|n_layers?|layers|depth|num_blocks|n_layer)", _at_most(_LAYERS)),
    (r"(encoder|decoder)_layers|num_(en|de)coder_layers", _at_most(2)),
    (r"max_window_layers", lambda _: 2),
    (r"(num_kv_shared_layers|num_nextn_predict_layers)", _at_most(2)),
    (r"(first_k_dense_replace|num_dense_layers|moe_layer_start_index)", _at_most(1)),
    (r"moe_layer_end_index", lambda _: _LAYERS - 1),
    (r".*(max_position_embeddings|model_max_length|max_seq_len|n_positions|n_ctx)", lambda _: _POSITIONS),
    (r".*(sliding_window|sliding_window_size|attention_window_size|local_attention|attention_chunk_size)",
     _at_most(_WINDOW)),
    (r"(global_attn_every_n_layers|sliding_window_pattern|_sliding_window_pattern|full_attention_interval)",
     _at_most(2)),
    (r"(attn_layer_period|expert_layer_period|no_rope_layer_interval|layer_group_size)", _at_most(2)),
    (r"(attn_layer_offset|expert_layer_offset)", _at_most(1)),
    (r".*(num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups)", _at_most(2)),
    (r".*(linear_num_key_heads|mamba_n_?groups|n_groups?|topk_group|num_expert_group)", _at_most(2)),
    (r".*(attention_heads|n_heads?|num_heads|mamba_n_heads|heads)", _at_most(_HEADS)),
    (r"(index_topk|index_topk_blocks)", _at_most(16)),
    (r".*(experts_per_tok(en)?|moe_top_?k|moe_k)", _at_most(2)),
    (r".*num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_experts", _at_most(4)),
    (r"zero_expert_num", _at_most(2)),
    (r"(q_lora_rank|o_lora_rank)", _at_most(24)),
    (r"kv_lora_rank", _at_most(16)),
    (r"(mamba_headdim|mamba_d_head|mamba_head_dim)", _at_most(32)),
    (r"(mamba_d_ssm)", _at_most(128)),
    (r"(.*_d_state|state_size|ssm_state_size|mamba_dt_rank|time_step_rank)", _at_most(8)),
    (r"(.*chunk_size|chunk_size)", _at_most(16)),
    (r".*(head_dim|head_size|dim_head|d_head|kv_channels|d_kv)", lambda value: min(value, max(_HEAD_DIM, value // 8))),
    (r"rotary_dim", _at_most(8)),
    (r".*(laurel_rank|lowrank|_rank|d_rel)", _at_most(8)),
    (r"(hidden_size_per_layer_input|ple_embed_dim)", _at_most(16)),
    (r".*(image_size)", _at_most(28)),
    (r".*(patch_size)", _at_most(14)),
    (r"num_position_embeddings", _at_most(16)),
    (r".*(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_dim|emb_dim|embedding_size|_width|"
     r"input_size|word_embed_proj_dim|_hidden_size|out_hidden_size|output_dim|d_inner|projection_dim|"
     r"attention_hidden_size)", _at_most(_HIDDEN)),
    (r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|d_ff|dim_ff|dff|feed_forward_size|mlp_dim|n_inner|"
     r"expert_dim)", _at_most(_HIDDEN)),
    (r"(original_max_position_embeddings)", _at_most(_POSITIONS // 4)),
)
_BY_LAYER = re.compile(r"(.*_idxs|moe_layers|.*layer_ids|mlp_only_layers|.*_indexes|cross_attention_layers)")
_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")

_MROPE = [4, 2, 2]
_NEEDED: dict[str, dict[str, Any]] = {}  # without which there is not even a default configuration
_EXCEPTIONS: dict[str, dict[str, Any]] = {  # by the path of a setting
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}},
    "dbrx": {"attn_config.rope_theta": 10_000.0},
    "falcon_h1": {"mamba_d_head": 32},
    "mamba2": {"head_dim": 32},
    "zamba": {"attention_hidden_size": 2 * _HIDDEN, "attention_head_dim": 2 * _HEAD_DIM},
    "zamba2": {"attention_hidden_size": 2 * _HIDDEN, "attention_head_dim": 2 * _HEAD_DIM, "mamba_headdim": 32},
    "hunyuan_v1_dense": {"head_dim": _HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": _HEAD_DIM},
    "hunyuan_vl": {"text_config.head_dim": _HEAD_DIM},
    "ministral": {"head_dim": _HEAD_DIM},
    "nemotron": {"num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
}


@dataclass(frozen=True, order=True)
class Architecture:
    """A class of model that reads text, and the model type whose configuration it is made from."""

    model_type: str
    class_name: str


def architectures() -> tuple[Architecture, ...]:
    """Return every decoder-only class that transformers maps a model type to, for text alone or with images or sound.

    Sorted. Classes that have an encoder of text are not among them.
    """
    return tuple(sorted(each for each in _mapped() if not default_config(each.model_type).is_encoder_decoder))


def encoder_decoders() -> tuple[str, ...]:
    """Return the model types that are left out, since an encoder reads their text."""
    found = {each.model_type for each in _mapped() if default_config(each.model_type).is_encoder_decoder}
    return tuple(sorted(found))


def _mapped() -> Iterator[Architecture]:
    from transformers.models.auto import modeling_auto

    seen = set()
    for name in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        for model_type, classes in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}).items():
            for class_name in (classes,) if isinstance(classes, str) else classes:
                if (model_type, class_name) not in seen:
                    seen.add((model_type, class_name))
                    yield Architecture(model_type, class_name)


@cache
def default_config(model_type: str) -> PreTrainedConfig:
    """Return what transformers makes of a model type when nothing is said."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    return kind(**_NEEDED.get(model_type, {}))


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return the default configuration of a model type, as small as can be with every kind of its layers."""
    default = default_config(model_type)
    settings = _shrunk(default.to_dict())
    for path, value in _EXCEPTIONS.get(model_type, {}).items():
        *sections, name = path.split(".")
        section = settings
        for each in sections:
            section = section[each]
        section[name] = value
    return type(default)(**settings)


def tiny_model_of(architecture: Architecture | str, attention: str | None = None, seed: int = 0) -> PreTrainedModel:
    """Make a random float32 model of an architecture, for the CPU, of some four layers."""
    import torch
    import transformers

    if isinstance(architecture, str):
        architecture = next(each for each in _mapped() if each.model_type == architecture)
    kind = getattr(transformers, architecture.class_name)
    config = tiny_config(architecture.model_type)
    if type(config) is not kind.config_class and isinstance(
        config.get_text_config(decoder=True), kind.config_class
    ):
        config = config.get_text_config(decoder=True)
    options = {} if attention is None else {"attn_implementation": attention}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind._from_config(config, dtype=torch.float32, **options)  # noqa: SLF001
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.15)  # attention of a usual start is nearly flat
    return model.float().eval()


def _shrunk(section: dict[str, Any]) -> dict[str, Any]:
    count = next((section[name] for name in _COUNTS if isinstance(section.get(name), int)), 0)
    by_layer = {name: value for name, value in section.items() if isinstance(value, list) and len(value) == count > 1}
    rows = _every_kind(by_layer.values(), count)
    small: dict[str, Any] = {}
    for name, value in section.items():
        if name in _UNTOUCHED:
            small[name] = value
        elif name in _SPECIAL and value is not None:
            small[name] = _SPECIAL[name]
        elif name in _COUNTS and value == count and count:
            small[name] = len(rows)
        elif name in by_layer and not isinstance(value[0], dict):
            small[name] = [_number(name, value[row]) for row in rows]
        elif name == "per_layer_config" and value:
            own = {int(key): changes for key, changes in value.items()}
            small[name] = {str(new): own[row] for new, row in enumerate(rows) if row in own}
        elif _BY_LAYER.fullmatch(name) and isinstance(value, list):
            small[name] = [new for new, row in enumerate(rows) if row in value]
        elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
            small[name] = _rope(value) if "rope" in name else _shrunk(value)
        else:
            small[name] = _number(name, value)
    for row, changes in (small.get("per_layer_config") or {}).items():
        small["per_layer_config"][row] = {
            name: small[name] * value // section[name] if section.get(name) and type(value) is int else value
            for name, value in changes.items()
        }
    if small.get("kv_lora_rank"):
        small["num_key_value_heads"] = small["num_attention_heads"]
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    return small


def _every_kind(lists: Any, count: int) -> list[int]:
    """Numbers of layers among which every kind occurs: the first of each kind, then the second, until it is enough."""
    if not lists:
        return list(range(min(count, _LAYERS)))
    places: list[list[int]] = []
    for values in lists:
        kinds: dict[str, list[int]] = {}
        for row, value in enumerate(values):
            kinds.setdefault(repr(value), []).append(row)
        places += kinds.values() if len(kinds) <= _LAYERS else []
    rows: list[int] = []
    for nth in range(count):
        if len(rows) >= min(count, _LAYERS):
            break
        rows += sorted({place[nth] for place in places if nth < len(place)} - set(rows))
    return rows or list(range(min(count, _LAYERS)))


def _number(name: str, value: Any) -> Any:
    if type(value) is not int:
        return value
    return next((change(value) for pattern, change in _RULES if re.fullmatch(pattern, name)), value)


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, dict):
            small[name] = _rope(value)
        elif name == "mrope_section" and value:
            whole = sum(value)
            rest = [max(1, part * _HEAD_DIM // 2 // whole) for part in value[1:]]
            small[name] = [_HEAD_DIM // 2 - sum(rest), *rest]
        else:
            small[name] = _number(name, value)
    return small
