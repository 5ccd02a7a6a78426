"""Tiny random models of several architectures, small enough for tests, with attention peaked enough for memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memlong.errors import UnknownNameError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 97
"""Vocabulary size of a tiny model: 0 is padding, 1 begins and 2 ends a text."""

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_ALTERNATING = {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"] * 2}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", _GROUPED),
    "Llama-YaRN": ("LlamaConfig", {**_GROUPED, "rope_parameters": _YARN}),
    "Qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 16}),
    "Mistral": ("MistralConfig", {**_GROUPED, "sliding_window": None}),
    "Mistral-sliding": ("MistralConfig", {**_GROUPED, "sliding_window": 40}),
    "Gemma3": ("Gemma3TextConfig", {**_GROUPED, "head_dim": 16, **_ALTERNATING}),
    "SmolLM3": ("SmolLM3Config", {**_GROUPED, "no_rope_layers": [1, 1, 0, 1]}),
    "GPT-NeoX": ("GPTNeoXConfig", _SIZES),
    "Phi": ("PhiConfig", _SIZES),
}
ARCHITECTURES = tuple(_CONFIGS)
"""Architectures of `tiny_model`."""


def tiny_model(architecture: str = "Llama", attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """Build a random float32 model on the CPU, with four layers, `VOCABULARY` tokens and 512 positions.

    Parameters
    ----------
    architecture : str
        One of `ARCHITECTURES`.
    attention : {"sdpa", "eager"}
        Attention implementation.
    seed : int
        Random seed of the weights. Torch's global random state is unchanged.

    Raises
    ------
    UnknownNameError
        If the architecture is unknown.
    """
    import torch
    import transformers

    if architecture not in _CONFIGS:
        raise UnknownNameError(
            f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}"
        )
    kind, options = _CONFIGS[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = getattr(transformers, kind)(**options)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.15)  # with the usual initialization, attention is nearly uniform
    return model.float().eval()  # type: ignore[no-any-return]
