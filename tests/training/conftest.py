"""Tiny decoders to train, and texts in which something comes back."""

from __future__ import annotations

import pytest
import torch

from memlong import MemoryDecoder
from memlong.training import Trainer, TrainingConfig, fit_latent_maps

QUICK = {
    "rows": 2,
    "document_tokens": 64,
    "accumulate": 2,
    "warmup_steps": 0,
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "lr": 5e-3,
}


@pytest.fixture
def documents(text):
    """Six documents of 200 tokens, each a phrase of 40 again and again."""
    return [text(40, seed=seed)[0].repeat(5) for seed in range(6)]


@pytest.fixture
def decoder(tiny_model, small, text, tmp_path):
    """A decoder on a new model, its settings by keyword; with maps where they are wanted."""

    def make(architecture="Llama", **changes):
        model = tiny_model(architecture)
        settings = {"kv_source": "shared", "retrieval_layers": "2-3", **changes}
        if settings["kv_source"] == "latent":
            path = tmp_path / "fitted.safetensors"
            fit_latent_maps(model, [text(200)], dim=32, layers=settings["retrieval_layers"]).save(path)
            settings["maps"] = str(path)
        return MemoryDecoder(model, None, small(**settings))

    return make


@pytest.fixture
def trainer(decoder, documents, tmp_path):
    def make(memory=None, folder="run", steps=6, architecture="Llama", lora=None, **changes):
        config = TrainingConfig(steps=steps, **{**QUICK, **changes})
        made = decoder(architecture, **(memory or {}))
        return Trainer(made, documents, config, folder=tmp_path / folder, lora=lora)

    return make


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)
