"""Models for benchmarks: loaded by name, or of a known shape with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from memlong import load_model
from memlong.decoder.model.machine import DTYPES
from memlong.errors import InvalidTextError
from memlong.evaluation import read_text, tokenize

SHAPES: dict[str, dict[str, int]] = {
    "random-tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "random-135m": {  # SmolLM2-135M
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "random-3b": {  # OpenLLaMA-3B
        "vocab_size": 32_000,
        "hidden_size": 3200,
        "intermediate_size": 8640,
        "num_hidden_layers": 26,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
MODEL_HELP = f"Hub id, folder, GGUF file, 'demo', or random weights: {', '.join(SHAPES)}."
_POSITIONS = 1 << 20  # for full attention over long texts


def load(name: str, *, dtype: str, device: str) -> tuple[PreTrainedModel, Any]:
    """Return a model and its tokenizer, which is None for random weights."""
    if name not in SHAPES:
        return load_model(name, dtype=dtype, device=device)
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=_POSITIONS)
    with torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    return model.eval(), None


def token_ids(model: PreTrainedModel, tokenizer: Any, text: Path, count: int) -> Tensor:
    """Return the text's first tokens [1, count], or random ones for a model without a tokenizer.

    Raises
    ------
    InvalidTextError
        If the text is too short.
    """
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, model.config.vocab_size, (1, count), generator=generator)
    found = tokenize(tokenizer, read_text(text), count)
    if found.shape[1] < count:
        raise InvalidTextError(
            f"The text has {found.shape[1]:,} tokens, fewer than {count:,}: give a longer one"
        )
    return found
