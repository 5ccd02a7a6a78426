"""From the candidates that an index names to the k best chunks, with true scores in a settled order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from memlong.bank.arrays import Floats, Ids
from memlong.bank.exact import Similarity, nearest_rows, true_scores
from memlong.bank.table import ChunkTable

_VALUES_PER_BLOCK = 1 << 22


@dataclass(frozen=True, eq=False)
class Ranking:
    """The k best rows of each query, best first, equal scores in ascending row (and so id) order.

    Attributes
    ----------
    scores : numpy.ndarray
        float32 [q, k]; -inf is missing.
    ids : numpy.ndarray
        int64 [q, k]; -1 is missing.
    rows : numpy.ndarray
        int64 [q, k], rows of the table; -1 is missing.
    """

    scores: Floats
    ids: Ids
    rows: Ids


def rank(table: ChunkTable, similarity: Similarity, queries: Floats, candidates: Ids, k: int) -> Ranking:
    """Score candidate ids against the table's embeddings and keep the best k.

    Parameters
    ----------
    table : ChunkTable
        At least one chunk.
    similarity : "inner_product" or "l2"
        What to rank by.
    queries : numpy.ndarray
        float32 [q, dim].
    candidates : numpy.ndarray
        int64 [q, c] ids in any order; ids that the table does not hold, and repeats, count for nothing.
    k : int
        How many columns to return.
    """
    ids = np.sort(candidates, axis=1)
    rows = table.rows_of(ids)
    rows[:, 1:][ids[:, 1:] == ids[:, :-1]] = -1
    scores = np.empty(rows.shape, dtype=np.float32)
    block = max(1, _VALUES_PER_BLOCK // max(1, rows.shape[1] * queries.shape[1]))
    for start in range(0, len(queries), block):
        part = slice(start, start + block)
        scores[part] = true_scores(queries[part], table.embeddings[rows[part]], similarity)
    scores[rows < 0] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, order, axis=1)
    return _padded(best, np.take_along_axis(ids, order, axis=1), np.take_along_axis(rows, order, axis=1), k)


def rank_exactly(table: ChunkTable, similarity: Similarity, queries: Floats, k: int) -> Ranking:
    """Rank the whole table by brute force; same arguments as `rank`."""
    rows = nearest_rows(
        torch.from_numpy(queries),
        torch.from_numpy(table.embeddings),
        torch.from_numpy(table.squared_norms),
        min(k, len(table)),
        similarity,
    ).numpy()
    return rank(table, similarity, queries, np.where(rows < 0, -1, table.ids[rows]), k)


def missing(count: int, k: int) -> Ranking:
    """Return the ranking of queries that find nothing."""
    nothing = np.empty((count, 0), dtype=np.int64)
    return _padded(nothing.astype(np.float32), nothing, nothing, k)


def _padded(scores: Floats, ids: Ids, rows: Ids, k: int) -> Ranking:
    count, have = rows.shape
    absent = rows < 0
    all_scores = np.full((count, k), -np.inf, dtype=np.float32)
    all_ids = np.full((count, k), -1, dtype=np.int64)
    all_rows = all_ids.copy()
    all_scores[:, :have] = scores
    all_ids[:, :have] = np.where(absent, -1, ids)
    all_rows[:, :have] = rows
    return Ranking(all_scores, all_ids, all_rows)
