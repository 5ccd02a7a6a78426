"""Exact search in blocks, and the ranking of candidates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memlong.bank import exact, ranking
from memlong.bank.table import ChunkTable


@pytest.fixture
def table():
    made = ChunkTable(8)
    vectors = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    made.append(np.arange(100, 160), vectors, np.zeros((60, 2), np.int64))
    return made


@pytest.mark.parametrize("similarity", ["inner_product", "l2"])
def test_small_blocks_change_nothing(table, similarity, monkeypatch):
    queries = np.random.default_rng(1).standard_normal((7, 8)).astype(np.float32)
    queries[3] = 0
    whole = ranking.rank_exactly(table, similarity, queries, 9)
    monkeypatch.setattr(exact, "_SCORES_PER_BLOCK", 130)
    monkeypatch.setattr(exact, "_VALUES_PER_BLOCK", 16)
    monkeypatch.setattr(ranking, "_VALUES_PER_BLOCK", 100)
    blocked = ranking.rank_exactly(table, similarity, queries, 9)
    assert np.array_equal(whole.ids, blocked.ids)
    assert np.array_equal(whole.scores, blocked.scores)


def test_candidates_are_ranked_whatever_an_index_names(table):
    """Repeats, gaps and ids that have left do no harm."""
    queries = table.embeddings[[5, 9]].copy()
    candidates = np.array([[105, 3, -1, 105, 109, 999], [-1, -1, 109, 109, 109, -1]])
    found = ranking.rank(table, "l2", queries, candidates, 3)
    assert found.ids.tolist() == [[105, 109, -1], [109, -1, -1]]
    assert found.rows.tolist() == [[5, 9, -1], [9, -1, -1]]
    assert found.scores[:, 0].tolist() == [0.0, 0.0]
    assert np.isneginf(found.scores[found.ids < 0]).all()


def test_the_bound_lets_usual_data_through_at_once(table):
    """Rescoring every row in doubt is for ties; usual data takes one product."""
    queries = torch.randn(20, 384)
    vectors = torch.randn(2000, 384)
    rows = exact.nearest_rows(queries, vectors, vectors.square().sum(1), 8, "inner_product")
    assert (rows >= 0).all(), "a row in doubt leaves gaps"
