"""Shrink a model's settings by name, keeping every kind of layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

VOCABULARY = 97
"""Vocabulary size of a tiny model: 0 is padding, 1 begins and 2 ends a text."""

_LAYERS = 4
_HIDDEN, _HEADS, _HEAD_DIM = 64, 4, 16
_WINDOW, _POSITIONS = 40, 512
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "_pad_token_id": 0, "sep_token_id": 2}
_UNTOUCHED = frozenset(
    {"id2label", "label2id", "dtype", "transformers_version", "model_type", "architectures"}
)
_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")
_NUMBERS_OF_LAYERS = re.compile(
    r"(.*_idxs|moe_layers|.*layer_ids|mlp_only_layers|rope_scaling_layers|.*_indexes|cross_attention_layers)"
)


def _at_most(number: int) -> Callable[[int], int]:
    return lambda value: min(value, number)


def _in_proportion(value: int) -> int:
    return min(value, max(_HEAD_DIM, value // 8))


_RULES: tuple[tuple[str, Callable[[int], int]], ...] = (
    # The first rule whose pattern matches a setting's full name applies.
    (r"(unpadded_)?vocab_size(_per_layer_input)?", lambda value: min(value, VOCABULARY)),
    (r"image.*_token_(id|index)", lambda value: max(value, VOCABULARY - 1)),  # never occurs in a trial's text
    (r"(video|audio).*_token_(id|index)", lambda value: max(value, VOCABULARY - 2)),
    (r"num_hidden_layers|num_layers|n_layers?|layers|depth|num_blocks|n_layer", _at_most(_LAYERS)),
    (
        r"(encoder|decoder)_layers|num_(en|de)coder_layers|.*(num_kv_shared|num_nextn_predict)_layers",
        _at_most(2),
    ),
    (r"max_window_layers", _at_most(2)),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", _at_most(1)),
    (r"moe_layer_end_index", _at_most(_LAYERS - 1)),
    (r"original_max_position_embeddings", _at_most(_POSITIONS // 4)),
    (r".*(max_position_embeddings|model_max_length|max_seq_len|n_positions|n_ctx)", _at_most(_POSITIONS)),
    (r".*(window|window_size|local_attention|attention_chunk_size)", _at_most(_WINDOW)),
    (r"_?sliding_window_pattern|(global_attn_every_n|full_attention_interval).*", _at_most(2)),
    (r"(attn|expert)_layer_period|no_rope_layer_interval|layer_group_size", _at_most(2)),
    (r"(attn|expert)_layer_offset", _at_most(1)),
    (r".*(num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups|linear_num_key_heads)", _at_most(2)),
    (r"(mamba_)?n_?groups?|topk_group|num_expert_group", _at_most(2)),
    (r".*heads(_per_layer)?|n_head", _at_most(_HEADS)),
    (r"index_topk(_blocks)?", _at_most(16)),
    (r".*experts_per_tok(en)?|moe_top_?k|moe_k|zero_expert_num", _at_most(2)),
    (r".*num_(local_|routed_)?experts|n_routed_experts", _at_most(4)),
    (r"[qo]_lora_rank", _at_most(24)),
    (r"kv_lora_rank", _at_most(16)),
    (r"mamba_headdim|mamba_d_head|mamba_head_dim", _at_most(32)),
    (r"mamba_d_ssm", _at_most(2 * _HIDDEN)),
    (r".*_d_state|.*state_size|mamba_dt_rank|time_step_rank|rotary_dim", _at_most(8)),
    (r".*chunk_size", _at_most(16)),
    (r".*(head_dim|head_size|dim_head|d_head|kv_channels|d_kv)", _in_proportion),
    (r".*rank|d_rel", _at_most(8)),
    (r"hidden_size_per_layer_input|ple_embed_dim|num_position_embeddings", _at_most(16)),
    (r".*image_size", _at_most(28)),
    (r".*patch_size", _at_most(14)),
    (
        r".*(hidden_size|hidden_dim|d_model|n_embd|emb(ed(ding)?)?_(dim|size)|_width|input_size|proj_dim|output_dim)",
        _at_most(_HIDDEN),
    ),
    (
        r".*(d_inner|projection_dim|channels|adapter_(in|out)_dim|intermediate_size.*|ffn_dim)",
        _at_most(_HIDDEN),
    ),
    (r".*(ffn_hidden_size|d_ff|dim_ff|dff|feed_forward_size|mlp_dim|n_inner|expert_dim)", _at_most(_HIDDEN)),
)

_WITHOUT_KEYS = (
    (r"(unpadded_)?vocab_size(_per_layer_input)?", 64),
    (r".*intermediate_size(_mlp)?|ffn_dim|.*ffn_hidden_size|n_inner", 16),
    (r".*num_(local_|routed_)?experts|n_routed_experts", 8),
    (r".*experts_per_tok(en)?|moe_top_?k|moe_k", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r".*_d_state|(ssm_)?state_size", 8),
    (r"(mamba_)?chunk_size", 16),
)


def shrunk(section: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a model, or of one of its sections, as small as possible."""
    section = _with_windows(section)
    count = next((section[name] for name in _COUNTS if isinstance(section.get(name), int)), 0)
    count = count or len(section.get("layers_block_type") or ())
    by_layer = {
        name: value
        for name, value in section.items()
        if isinstance(value, list) and len(value) == count > 1 and not _NUMBERS_OF_LAYERS.fullmatch(name)
    }
    rows = _every_kind(by_layer.values(), count)
    small = {
        name: _small(name, value, count, rows) for name, value in section.items() if name not in by_layer
    }
    small |= {name: [_number(name, value[row]) for row in rows] for name, value in by_layer.items()}
    if small.get("kv_lora_rank"):  # latent attention: some widths are sums of others
        small["num_key_value_heads"] = small["num_attention_heads"]
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
        for part in ("qk_head_dim", "qk_rope_head_dim"):
            if part in section and section[part] == section.get("head_dim"):
                small["head_dim"] = small[part]
    if small.get("per_layer_config"):
        small["per_layer_config"] = _of_single_layers(section, small, rows)
    return {name: small[name] for name in section}


def leaned(section: dict[str, Any]) -> dict[str, Any]:
    """Shrink the settings that do not affect keys and values: vocabulary, MLPs, experts, recurrent states."""
    lean: dict[str, Any] = {}
    for name, value in section.items():
        for pattern, number in _WITHOUT_KEYS:
            if re.fullmatch(pattern, name) and type(value) is int:
                lean[name] = min(value, number)
            elif (
                re.fullmatch(pattern, name)
                and isinstance(value, list)
                and all(type(each) is int for each in value)
            ):
                lean[name] = [min(each, number) for each in value]
    return lean


def _with_windows(section: dict[str, Any]) -> dict[str, Any]:
    """Alternate layer types if a window is set but unused by all layers, as checkpoints may use it in some."""
    types = section.get("layer_types")
    if not section.get("sliding_window") or not isinstance(types, list) or set(types) != {"full_attention"}:
        return section
    return {
        **section,
        "layer_types": [("sliding_attention", "full_attention")[row % 2] for row in range(len(types))],
    }


def _every_kind(lists: Collection[list[Any]], count: int) -> list[int]:
    """Pick layers so that every kind occurs: the first of each kind, then the second, until there are enough."""
    places: list[list[int]] = []
    for values in lists:
        kinds: dict[str, list[int]] = {}
        for row, value in enumerate(values):
            kinds.setdefault(repr(value), []).append(row)
        if len(kinds) <= _LAYERS:  # otherwise a per-layer number, not a kind
            places += kinds.values()
    rows: list[int] = []
    for nth in range(count if places else 0):
        if nth < 2 or len(rows) < _LAYERS:
            rows += sorted({place[nth] for place in places if nth < len(place)} - set(rows))
    return rows or list(range(min(count, _LAYERS)))


def _small(name: str, value: Any, count: int, rows: list[int]) -> Any:
    if name in _UNTOUCHED:
        return value
    if name in _SPECIAL and value is not None:
        return _SPECIAL[name]
    if name == "is_decoder":
        return True
    if name in _COUNTS and value == count:
        return len(rows)
    if _NUMBERS_OF_LAYERS.fullmatch(name) and isinstance(value, list):
        return [new for new, row in enumerate(rows) if row in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value) and name != "per_layer_config":
        return _rope(value) if "rope" in name else shrunk(value)
    return _number(name, value)


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
            rest = [max(1, part * _HEAD_DIM // 2 // sum(value)) for part in value[1:]]
            small[name] = [_HEAD_DIM // 2 - sum(rest), *rest]
        else:
            small[name] = _number(name, value)
    return small


def _of_single_layers(
    section: dict[str, Any], small: dict[str, Any], rows: list[int]
) -> dict[str, dict[str, Any]]:
    """Keep per-layer overrides, in proportion to the shrunk defaults."""
    own = {int(layer): changes for layer, changes in section["per_layer_config"].items()}
    return {
        str(new): {
            name: small[name] * value // section[name] if type(value) is int and section.get(name) else value
            for name, value in own[row].items()
        }
        for new, row in enumerate(rows)
        if row in own
    }
