"""Settings of tiny models that the shrinking rules get wrong, by model type and path of the setting."""

from __future__ import annotations

from typing import Any

_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_FUSED_INTERNALS = {"attention_hidden_size": 128, "attention_head_dim": 32}  # twice the hidden size
_THREE_AXES = {"text_config.rope_parameters.mrope_section": [4, 2, 2]}
_NO_EXTRA_EMBEDDINGS = {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
_IMAGES_OF_TOKENS = {"vocabulary_map": {"<image>": 96}}
_TINY_CODER = {"vq_config.base_channels": 32, "vq_config.num_embeddings": 32, "vq_config.latent_channels": 32}


_WIDER_IN_WINDOWS = {
    "qk_nope_head_dim": 32,
    "head_dim": 64,
    **{f"per_layer_config.{layer}.qk_nope_head_dim": 48 for layer in (2, 3)},
}


def _inside(section: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for name, value in settings.items()}


NEEDED: dict[str, dict[str, Any]] = {"gemma4_assistant": _NO_EXTRA_EMBEDDINGS}
"""Settings without which a model type has no default configuration."""

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "bamba": {"attn_layer_indices": [1, 3]},
    "chameleon": _IMAGES_OF_TOKENS | _TINY_CODER,
    "cohere_compass": {
        "text_config.rope_parameters": {"full_attention": _PLAIN_ROPE, "sliding_attention": _PLAIN_ROPE},
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _PLAIN_ROPE, "sliding_attention": _PLAIN_ROPE},
    },
    "dbrx": {"attn_config.rope_theta": 10_000.0, "attn_config.clip_qkv": 8},
    "deepseek_ocr2": _inside("text_config", {**_EXPERTS, "mlp_layer_types": ["dense", "sparse"] * 2}),
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": _inside(
        "text_config", {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    ),
    "dots1": _EXPERTS,
    "dots3_note": _inside("text_config", _WIDER_IN_WINDOWS),
    "dots3_note_text": _WIDER_IN_WINDOWS,
    "emu3": _IMAGES_OF_TOKENS | {"vq_config.base_channels": 32, "vq_config.codebook_size": 32},
    "ernie4_5_vl_moe": {
        "text_config.moe_intermediate_size": [32, 16],
        "text_config.rope_parameters.mrope_section": [3, 3, 2],
    },
    "falcon_h1": {"mamba_d_head": 32},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "gemma4_assistant": {"text_config.num_kv_shared_layers": 4},
    "gemma4_text": {"num_kv_shared_layers": 2},
    "glm46v": _THREE_AXES,
    "glm4v": _THREE_AXES,
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": [2, 1, 1]},
    "glm_ocr": _THREE_AXES,
    "glmga": _THREE_AXES,
    "granite4_vision": {"deepstack_layer_map": [], "downsample_rate": "1/2"},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl": {"text_config.head_dim": 16, "text_config.rope_parameters.mrope_section": [2, 2, 2, 2]},
    "janus": _TINY_CODER,
    "kyutai_speech_to_text": {"audio_pad_token_id": 0, "codec_config.upsample_groups": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_vl": {"text_config.layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 32},
    "ministral": {"head_dim": 16},
    "mistral_large4": {"text_config.kv_source_layers": [0, 1, 2, 1, 2]},
    "molmo2": {"adapter_config.vision_feature_layer": [3, 2]},
    "muse_spark": {"audio_config.hidden_sizes": [8, 8, 8, 8], "audio_config.depths": [1, 1, 1, 1]},
    "nemo_speechlm": {"word_timestamp_config.blank_token_id": 96},
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl": _THREE_AXES,
    "qwen2_5_omni_thinker": {**_THREE_AXES, "vision_start_token_id": 200},
    "qwen2_5_vl": _THREE_AXES,
    "qwen2_vl": _THREE_AXES,
    "qwen3_omni_moe": {
        "talker_config.text_config.shared_expert_intermediate_size": 16,
        "talker_config.spatial_merge_size": 2,
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 200},
    "qwen4_exp": _inside("text_config", _INDEXER),
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32]},
    "step3p7": {
        "text_config.layer_types": _ALTERNATING,
        "text_config.sliding_window": 40,
        "text_config.rope_parameters": {"full_attention": _PLAIN_ROPE, "sliding_attention": _PLAIN_ROPE},
    },
    "vibevoice_asr": {
        "acoustic_tokenizer_chunk_size": 3200,
        "acoustic_tokenizer_encoder_config.num_filters": 1,
        "semantic_tokenizer_encoder_config.num_filters": 1,
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": _FUSED_INTERNALS,
    "zamba2": {**_FUSED_INTERNALS, "mamba_headdim": 32},
}
"""Settings that replace a model type's shrunk ones."""
