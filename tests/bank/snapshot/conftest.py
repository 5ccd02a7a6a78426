"""Small banks of every backend that have seen all that can befall a bank, and their snapshots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from memlong import create_bank
from memlong.bank import MemoryBank
from memlong.testing.harness import DIM, random_chunks, random_vectors

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "torch": ("torch", {}),
    "faiss": ("faiss", {}),
    "faiss-hnsw": ("faiss", {"index": "HNSW32"}),
    "hnswlib": ("hnswlib", {"initial_capacity": 8}),
}


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make() -> Callable[..., MemoryBank]:
    def made(backend: str = "torch", chunks: int = 40, **options: Any) -> MemoryBank:
        name, own = BACKENDS[backend]
        bank = create_bank(name, DIM, **own, **options)
        if chunks:
            random_chunks(chunks).into(bank)
            bank.remove(bank.ids[[3, 7]])
            bank.retrieve(random_vectors(3, seed=5), 2)
        return bank

    return made
