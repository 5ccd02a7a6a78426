"""A session in Milvus over a base in Milvus answers as one bank with all their chunks."""

from __future__ import annotations

from pathlib import Path

import torch

from memlong import LayeredBank, create_bank, load_bank
from memlong.testing.harness import DIM, random_chunks, random_vectors
from memlong_milvus.bank import MilvusBank

TOP = 1 << 52


def test_a_session_lies_over_a_base(tmp_path: Path) -> None:
    place = {"uri": str(tmp_path / "memory.db"), "collection": "shared"}
    base = MilvusBank(DIM, session="manual", **place)
    random_chunks(12, seed=1).into(base)
    top = MilvusBank(DIM, session="user", **place)
    layered, merged = LayeredBank(top, [base]), create_bank("torch", DIM)
    random_chunks(12, seed=1).into(merged)
    for bank in (layered, merged):
        random_chunks(5, seed=2, first=100).into(bank)
    found, expected = layered.retrieve(random_vectors(2), 6), merged.retrieve(random_vectors(2), 6)
    assert found.ids.tolist() == [
        [each if each < 12 else TOP + each - 12 for each in row] for row in expected.ids.tolist()
    ]
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.keys, expected.keys)
    only = layered.search(random_vectors(1), 3, among=[2, TOP + 1])
    assert sorted(only.ids[0].tolist()) == [-1, 2, TOP + 1]
    layered.save(tmp_path / "saved")
    again = load_bank(tmp_path / "saved", "torch", bases=[base])
    assert torch.equal(again.retrieve(random_vectors(2), 6).values, expected.values)
    layered.reset()
    assert (len(layered), len(base)) == (12, 12)
