"""TorchBank equals a brute force that shares no code with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlong.bank import bank_of
from memlong.errors import DeviceUnavailableError
from memlong_torch.index import DeviceMatrix, TorchIndex

TorchBank = bank_of(TorchIndex)


def brute_force(metric, queries, vectors, k):
    """Score pair by pair in float64, sort by (score in float32 descending, id ascending)."""
    scores, ids = [], []
    for query in np.asarray(queries, dtype=np.float64):
        pairs = []
        for number, vector in enumerate(np.asarray(vectors, dtype=np.float64)):
            score = -np.sum((query - vector) ** 2) if metric == "l2" else np.sum(query * vector)
            pairs.append((-np.float32(score), number))
        pairs.sort()
        ids.append([number for _, number in pairs[:k]])
        scores.append([-score for score, _ in pairs[:k]])
    return ids, scores


def agree(bank, metric, queries, k):
    found = bank.search(queries, k)
    ids, scores = brute_force(metric, queries, bank.embeddings.embeddings, k)
    assert found.ids.tolist() == ids
    assert found.scores.tolist() == scores


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize("queries", [1, 5])
def test_equals_brute_force_exactly(metric, queries, fill):
    bank = TorchBank(48, metric=metric)
    fill(bank, torch.randn(700, 48))
    agree(bank, metric, torch.randn(queries, 48), 10)


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
def test_equals_brute_force_where_float32_cannot_tell_rows_apart(metric, fill):
    """All rows lie so close together, far from the origin, that a float32 product orders them at random."""
    bank = TorchBank(16, metric=metric)
    fill(bank, 1000 + 1e-3 * torch.randn(300, 16))
    agree(bank, metric, 1000 + 1e-3 * torch.randn(3, 16), 10)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), metric=st.sampled_from(["inner_product", "l2"]), k=st.integers(1, 30))
def test_ties_keep_the_lowest_ids(data, metric, k):
    """Vectors of few small integers tie all the time."""
    rows = data.draw(st.lists(st.tuples(*[st.integers(-1, 1)] * 3), min_size=k, max_size=80))
    bank = TorchBank(3, metric=metric)
    blocks = torch.ones(len(rows), 1, 1, 1, 1)
    bank.add(torch.tensor(rows, dtype=torch.float32), blocks, blocks, [[0, 1]] * len(rows))
    agree(bank, metric, torch.tensor(rows[:3], dtype=torch.float32), k)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_lower_matmul_precision_does_not_change_results(precision, fill):
    bank = TorchBank(64)
    fill(bank, torch.randn(500, 64))
    queries = torch.randn(9, 64)
    before = torch.get_float32_matmul_precision()
    expected = bank.search(queries, 8)
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = bank.search(queries, 8)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cuda_device_that_is_not_there_is_an_error():
    with pytest.raises(DeviceUnavailableError, match="sees 0 CUDA devices: use device='cpu'"):
        TorchBank(4, device="cuda")


def test_the_device_matrix_follows_the_table():
    matrix, rows = DeviceMatrix(2, torch.device("cpu")), np.arange(400, dtype=np.float32).reshape(200, 2)
    matrix.append(rows[:150])
    matrix.remove(np.array([0, 7, 149]))
    matrix.append(rows[150:])
    assert np.array_equal(matrix.rows.numpy(), np.delete(rows, [0, 7, 149], axis=0))
    matrix.clear()
    assert matrix.rows.shape == (0, 2)
