"""Fixtures shared by the tests of backends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from memlong.bank import MemoryBank


@pytest.fixture
def fill() -> Callable[[MemoryBank, torch.Tensor], torch.Tensor]:
    """Add chunks with these embeddings and one-number K-V."""

    def add(bank: MemoryBank, embeddings: torch.Tensor) -> torch.Tensor:
        count = len(embeddings)
        blocks = torch.ones(count, 1, 1, 1, 1)
        return bank.add(embeddings, blocks, blocks, torch.tensor([[0, 1]]).repeat(count, 1))

    return add


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A FAISS that believes in one GPU, whose indexes are those of the CPU but know no search parameters."""
    import faiss

    class Resident:
        def __init__(self, index: faiss.Index) -> None:
            self.index = index

        def add(self, embeddings: object) -> None:
            self.index.add(embeddings)

        def search(self, queries: object, k: int) -> object:
            assert k <= 2048
            return self.index.search(queries, k)

    class Resources:
        def setTempMemory(self, size: int) -> None: ...  # noqa: N802 - FAISS's names

        def setPinnedMemory(self, size: int) -> None: ...  # noqa: N802

    monkeypatch.setattr(faiss, "StandardGpuResources", Resources, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda _, __, index: Resident(index), raising=False)
