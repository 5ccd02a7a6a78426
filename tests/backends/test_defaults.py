"""Torch's default dtype and device, which are the caller's, change nothing that a bank does."""

from __future__ import annotations

import pytest
import torch

from memlong.bank import Draft, TieredStore
from memlong.plugins import Registry

SHAPE = (2, 1, 4, 8)
STORES = {
    "memory": lambda _: None,
    "host": lambda _: TieredStore(host="all"),
    "disk": lambda folder: TieredStore(host="2kB", disk=folder, dtype="int8"),
}


@pytest.fixture
def others():
    """Set other defaults, for as long as a test runs."""

    def set_them():
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")

    yield set_them
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def everything(backend, metric, store, folder, vectors, blocks, spans, queries):
    """Return all that a bank gives back when it is used in every way."""
    bank = Registry().create_bank(backend, 6, metric=metric, max_chunks=60, store=STORES[store](folder))
    found = [bank.add(vectors[:50], blocks[:50], blocks[:50], spans[:50])]
    found.append(bank.add(vectors[50:70], blocks[50:70], blocks[50:70], spans[50:70]))
    found.append(bank.add(vectors[:0], blocks[:0], blocks[:0], spans[:0]))
    found.append(bank.evict(3))
    bank.remove([20, 30])
    draft = Draft(bank)
    draft.add(vectors[70:], blocks[70:], blocks[70:], spans[70:])
    bank.save(folder / "bank")
    banks = [
        bank,
        draft,
        Registry().load_bank(folder / "bank"),
        Registry().load_bank(folder / "bank", lazy=True),
    ]
    for each in banks:
        for k in (4, 200):
            if each is not draft:
                got = each.retrieve(queries[:1], k)
                found += [got.ids, got.scores, got.keys, got.values, got.spans]
            result = each.search(queries[:1], k)
            found += [result.ids, result.scores]
        chunks = each.fetch([40, 70, 25])
        found += [chunks.ids, chunks.keys, chunks.values, chunks.spans, each.spans_of([40, 999])]
        found.append(each.embeddings_of([40, 999]))
    found += [bank.exact_search(queries, 5).ids, bank.ids, bank.embeddings.embeddings]
    bank.reset()
    found.append(bank.retrieve(queries, 2).ids)
    return found


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("backend", ["torch", "faiss", "hnswlib"])
def test_they_change_nothing(backend, metric, store, others, tmp_path):
    pytest.importorskip(backend)
    generator = torch.Generator().manual_seed(0)
    vectors, queries = (torch.randn(count, 6, generator=generator) for count in (72, 3))
    blocks = torch.randn(72, *SHAPE, generator=generator).to(torch.bfloat16)
    spans = torch.arange(144).view(72, 2)
    inputs = vectors, blocks, spans, queries
    results = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        results.append(everything(backend, metric, store, folder, *inputs))
        others()
    torch.set_default_device(None)
    assert len(results[0]) == len(results[1]) > 40
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.device == theirs.device
        assert torch.equal(ours, theirs)
