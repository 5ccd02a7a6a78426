"""Exact search in blocks, and the ranking of candidates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memlong.bank.index import exact, ranking
from memlong.bank.index.table import ChunkTable


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


def test_the_bound_lets_usual_data_through_at_once(monkeypatch):
    """Rescoring every row in doubt is for ties; usual data takes one product, and few more rows than are wanted."""
    monkeypatch.setattr(exact, "_best_of", None)
    queries = torch.randn(20, 384)
    vectors = torch.randn(2000, 384)
    rows = exact.nearest_rows(queries, vectors, vectors.square().sum(1), 8, "inner_product")
    assert 8 <= rows.shape[1] <= 10
    assert (rows[:, :8] >= 0).all()


def plainly(embeddings, similarity, query, rows):
    """Rows and float32 scores of one query, best first, by the definition."""
    scores = [
        np.float32(
            sum(float(a) * float(b) for a, b in zip(query, embeddings[row], strict=True))
            if similarity == "inner_product"
            else -sum((float(a) - float(b)) ** 2 for a, b in zip(query, embeddings[row], strict=True))
        )
        for row in rows
    ]
    return sorted(zip(scores, rows, strict=True), key=lambda found: (-found[0], found[1]))


@pytest.mark.parametrize("similarity", ["inner_product", "l2"])
@pytest.mark.parametrize("k", [1, 5, 60])
def test_ranking_is_what_the_definition_says(similarity, k):
    """Numbers of few bits, so that sums are exact in any order and many scores are equal."""
    rng = np.random.default_rng(k)
    table = ChunkTable(8)
    vectors = rng.integers(-2, 3, (60, 8)).astype(np.float32)
    table.append(np.arange(100, 160), vectors, np.zeros((60, 2), np.int64))
    queries = rng.integers(-2, 3, (5, 8)).astype(np.float32)
    named = np.stack([rng.permutation(60) for _ in queries])[:, : max(k, 30)]
    some = ranking.rank(table, similarity, queries, table.ids[named], k)
    every = ranking.rank_exactly(table, similarity, queries, k)
    for found, candidates in ((some, named), (every, [range(60)] * 5)):
        for query, rows in enumerate(candidates):
            wanted = plainly(vectors, similarity, queries[query], rows)[:k]
            assert found.rows[query].tolist() == [row for _, row in wanted]
            assert found.ids[query].tolist() == [100 + row for _, row in wanted]
            assert found.scores[query].tolist() == [score for score, _ in wanted]


@pytest.mark.parametrize("similarity", ["inner_product", "l2"])
@pytest.mark.parametrize("dim", [1, 7, 384, 1025])
def test_a_score_depends_on_its_two_vectors_alone(similarity, dim):
    """To the last bit: wherever they lie in memory, and whatever stands beside them."""
    rng = np.random.default_rng(dim)
    queries = rng.standard_normal((9, dim)).astype(np.float32)
    vectors = rng.standard_normal((9, 13, dim)).astype(np.float32)
    together = exact.true_scores(queries, vectors, similarity)
    for query in range(9):
        for number in range(13):
            pair = queries[query, None], vectors[query, number][None, None]
            assert exact.true_scores(*pair, similarity).item() == together[query, number]


def test_a_longest_vector_that_has_left_does_no_harm():
    table = ChunkTable(4)
    vectors = np.random.default_rng(2).standard_normal((50, 4)).astype(np.float32)
    vectors[0] *= 1e9
    table.append(np.arange(50), vectors, np.zeros((50, 2), np.int64))
    table.remove(np.array([0]))
    found = ranking.rank_exactly(table, "inner_product", vectors[3:5], 3)
    scores = vectors[3:5].astype(np.float64) @ vectors[1:].T.astype(np.float64)
    assert found.rows.tolist() == np.argsort(-scores, axis=1)[:, :3].tolist()


@pytest.mark.parametrize("columns", [2000, 2048, 2049, 9999])
@pytest.mark.parametrize("count", [1, 7, 15, 40])
def test_the_largest_scores_are_those_that_topk_finds(columns, count, monkeypatch):
    monkeypatch.setattr(exact, "_SCORES_FOR_BLOCKS", 0)
    scores = torch.randn(5, columns)
    scores[1] = scores[1].round()  # many are equal
    scores[2, -1] = 99.0
    values, found = exact.largest(scores, count)
    assert torch.equal(values, scores.topk(count).values)
    assert torch.equal(values, scores.gather(1, found))
    assert all(len(set(row)) == count for row in found.tolist())
