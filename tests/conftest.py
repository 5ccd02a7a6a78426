"""Tiny random models of several architectures, and banks of every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from memlong import MemoryConfig
from memlong.testing import ARCHITECTURES, VOCABULARY

pytest_plugins = ["memlong.testing.plugin"]

BACKENDS: dict[str, dict[str, Any]] = {"torch": {}, "faiss": {"index": "Flat"}, "hnswlib": {"ef": 200}}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def llama(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model()


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
