"""Tiny random models of several architectures, and banks of every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from memlong import MemoryConfig

VOCABULARY = 97
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

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", _GROUPED),
    "Llama-YaRN": (
        "LlamaConfig",
        {
            **_GROUPED,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "Qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 16}),
    "Mistral": ("MistralConfig", {**_GROUPED, "sliding_window": None}),
    "Mistral-sliding": ("MistralConfig", {**_GROUPED, "sliding_window": 40}),
    "Gemma3": ("Gemma3TextConfig", {**_GROUPED, "head_dim": 16, **_ALTERNATING}),
    "SmolLM3": ("SmolLM3Config", {**_GROUPED, "no_rope_layers": [1, 1, 0, 1]}),
    "GPT-NeoX": ("GPTNeoXConfig", _SIZES),
    "Phi": ("PhiConfig", _SIZES),
}
BACKENDS: dict[str, dict[str, Any]] = {"torch": {}, "faiss": {"index": "Flat"}, "hnswlib": {"ef": 200}}


def build(name: str, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A random float32 model whose attention is sharp enough for memory to matter."""
    kind, options = CONFIGS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
    return model.float().eval()


@pytest.fixture(params=list(CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    return build


@pytest.fixture
def llama() -> PreTrainedModel:
    return build("Llama")


@pytest.fixture
def small() -> Callable[..., MemoryConfig]:
    """Sizes small enough that a few hundred tokens make many chunks."""

    def make(**changes: Any) -> MemoryConfig:
        settings: dict[str, Any] = {
            "backend": "torch",
            "retriever": "lm",
            "chunk_size": 4,
            "top_k": 3,
            "local_window": 24,
            "sink_tokens": 2,
            "segment_size": 8,
        }
        settings.update(changes)
        settings.setdefault("backend_options", BACKENDS.get(settings["backend"] or "", {}))
        return MemoryConfig(**settings)

    return make


@pytest.fixture
def text() -> Callable[..., torch.Tensor]:
    """Random token ids [rows, tokens] that hold no special token."""

    def make(tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)

    return make
