"""From the candidates that an index names to the k best chunks, with true scores in a settled order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from memlong.bank.arrays import Floats, Ids
from memlong.bank.index.exact import ROWS_PER_COPY, Similarity, nearest_rows, true_scores
from memlong.bank.index.table import ChunkTable

_ROWS_PER_CANDIDATE = 48  # that brute force reads while a graph finds one
_MOST_CANDIDATES = 2048  # FAISS on a GPU refuses more
_VALUES_PER_BLOCK = 1 << 16  # in float64 they stay in the processor's cache


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
    rows = table.rows_of(candidates)
    scores = _scores(table.embeddings, similarity, queries, rows)
    if not (
        scores[:, 1:] < scores[:, :-1]
    ).all():  # or they are in order, and nothing is missing or there twice
        scores, rows = _in_order(scores, rows)
        repeats = rows[:, 1:] == rows[:, :-1]
        if repeats.any():
            rows[:, 1:][repeats] = -1
            scores, rows = _in_order(np.where(rows < 0, -np.inf, scores), rows)
    return _ranking(table.ids, scores[:, :k], rows[:, :k], k)


def rank_exactly(
    table: ChunkTable, similarity: Similarity, queries: Floats, k: int, among: Ids | None = None
) -> Ranking:
    """Rank the table by brute force, or its rows `among`, ascending, at least one; else the arguments of `rank`."""
    rows = nearest_rows(
        torch.from_numpy(queries),
        torch.from_numpy(table.embeddings),
        torch.from_numpy(table.squared_norms),
        min(k, len(table) if among is None else len(among)),
        similarity,
        longest=table.longest,
        among=None if among is None else torch.from_numpy(among),
    ).numpy()
    return rank(table, similarity, queries, np.where(rows < 0, -1, table.ids[rows]), k)


def width_among(k: int, among: Ids, held: int) -> int | None:
    """Return how many candidates to ask an index for, of which k are `among` rows; None for brute force instead.

    Where chance has chosen these rows, fewer than k of the candidates are among them for one query in ten thousand.
    Brute force reads the rows, and an index reads some for each candidate: what reads less is taken.
    """
    width = min(held, math.ceil((2 * k + 8) * held / len(among)))
    reads = min(ROWS_PER_COPY * len(among), int(among[-1] - among[0]) + 1)
    return None if width > _MOST_CANDIDATES or reads <= _ROWS_PER_CANDIDATE * width else width


def only(table: ChunkTable, found: Ranking, among: Ids, k: int) -> Ranking:
    """Keep the k best of each query that are among these rows, ascending, at least one."""
    gone = among.take(among.searchsorted(found.rows), mode="clip") != found.rows
    query = np.arange(len(gone))[:, None]
    order = gone.argsort(axis=1, kind="stable")[:, :k]
    gone = gone[query, order]
    scores = np.where(gone, np.float32(-np.inf), found.scores[query, order])
    return _ranking(table.ids, scores, np.where(gone, -1, found.rows[query, order]), k)


def missing(count: int, k: int) -> Ranking:
    """Return the ranking of queries that find nothing."""
    nothing = np.full((count, k), -1, dtype=np.int64)
    return Ranking(np.full((count, k), -np.inf, dtype=np.float32), nothing, nothing.copy())


def _scores(embeddings: Floats, similarity: Similarity, queries: Floats, rows: Ids) -> Floats:
    block = max(1, _VALUES_PER_BLOCK // max(1, rows.shape[1] * queries.shape[1]))
    parts = [
        true_scores(queries[start : start + block], embeddings[rows[start : start + block]], similarity)
        for start in range(0, len(queries), block)
    ]
    scores = np.concatenate(parts)
    scores[rows < 0] = -np.inf
    return scores


def _in_order(scores: Floats, rows: Ids) -> tuple[Floats, Ids]:
    order = np.lexsort((rows, -scores))
    query = np.arange(len(rows))[:, None]
    return scores[query, order], rows[query, order]


def _ranking(ids: Ids, scores: Floats, rows: Ids, k: int) -> Ranking:
    found = ids[rows]
    found[rows < 0] = -1
    count, have = rows.shape
    if have == k:
        return Ranking(scores, found, rows)
    padded = missing(count, k)
    padded.scores[:, :have] = scores
    padded.ids[:, :have] = found
    padded.rows[:, :have] = rows
    return padded
