"""Exact nearest-neighbour search, on any torch device, that float32 rounding and ties cannot upset."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch

from memlong.bank.arrays import Floats

Similarity = Literal["inner_product", "l2"]

_MARGIN = 16
_SCORES_PER_BLOCK = 1 << 24
_VALUES_PER_BLOCK = 1 << 22
_INPUT_ROUNDING = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}


def true_scores(queries: Floats, vectors: Floats, similarity: Similarity) -> Floats:
    """Score vectors in float64 and round once, so that a score depends on its two vectors alone.

    Parameters
    ----------
    queries : numpy.ndarray
        float32 [q, dim].
    vectors : numpy.ndarray
        float32 [q, c, dim], the c candidates of each query.
    similarity : "inner_product" or "l2"
        L2 is the negative squared distance.

    Returns
    -------
    numpy.ndarray
        float32 [q, c].
    """
    wide = vectors.astype(np.float64)
    if similarity == "l2":
        wide -= queries[:, None, :]
        scores = -np.einsum("qcd,qcd->qc", wide, wide)
    else:
        scores = np.einsum("qcd,qd->qc", wide, queries.astype(np.float64))
    return scores.astype(np.float32)


def nearest_rows(
    queries: torch.Tensor,
    vectors: torch.Tensor,
    squared_norms: torch.Tensor,
    k: int,
    similarity: Similarity,
    *,
    longest: float | None = None,
) -> torch.Tensor:
    """Return rows among which the true k best of each query certainly are.

    One float32 product scores every row. Its error is bounded (Higham, Accuracy and Stability of Numerical
    Algorithms, section 3.1), so if the best k + 16 rows reach further down than that error can, they hold the
    true k best, ties included, and those of them that lie within it are returned. Where they do not (many equal or nearly equal rows), every row in doubt is
    scored again in float64.

    Parameters
    ----------
    queries : torch.Tensor
        float32 [q, dim].
    vectors : torch.Tensor
        float32 [n, dim], on the same device.
    squared_norms : torch.Tensor
        float32 [n], the squared length of each vector.
    k : int
        1 <= k <= n.
    similarity : "inner_product" or "l2"
        What to rank by.
    longest : float, optional
        A length that no vector exceeds, where it is known.

    Returns
    -------
    torch.Tensor
        int64 [q, c] row numbers in no particular order, c >= k; -1 is no row.
    """
    width = min(len(vectors), k + _MARGIN)
    block = max(1, _SCORES_PER_BLOCK // len(vectors))
    if longest is None:
        longest = math.sqrt(squared_norms.max().item())
    pieces = []
    for start in range(0, len(queries), block):
        part = queries[start : start + block]
        scores = _coarse_scores(part, vectors, squared_norms, similarity)
        best = scores.topk(width, dim=1)
        rows = best.indices
        if width < len(vectors):
            doubt = 2 * _score_error(part, longest, similarity)
            lower = best.values[:, k - 1] - doubt
            too_low = best.values < lower[:, None]
            for unsure in (~too_low[:, -1]).nonzero()[:, 0].tolist():
                in_doubt = (scores[unsure] >= lower[unsure]).nonzero()[:, 0]
                rows[unsure] = -1
                rows[unsure, :k] = _best_of(part[unsure], vectors, in_doubt, k, similarity)
            rows.masked_fill_(too_low, -1)
        pieces.append(rows)
    if not pieces:
        return torch.empty(0, width, dtype=torch.int64, device=vectors.device)
    found = torch.cat(pieces)
    return found[:, : int((found >= 0).sum(1).max())]


def _coarse_scores(
    queries: torch.Tensor, vectors: torch.Tensor, squared_norms: torch.Tensor, similarity: Similarity
) -> torch.Tensor:
    # Autocast leaves alone what has an `out`, and costs nothing so.
    products = torch.empty(len(queries), len(vectors), dtype=torch.float32, device=vectors.device)
    if len(queries) == 1:
        torch.mv(vectors, queries[0], out=products[0])
    else:
        torch.mm(queries, vectors.T, out=products)
    if similarity == "l2":
        products.mul_(2).sub_(squared_norms)
    return products


def _score_error(queries: torch.Tensor, longest: float, similarity: Similarity) -> torch.Tensor:
    rounding = (queries.shape[1] + 8) * 2.0**-24
    relative = rounding / (1 - rounding) + 2 * _INPUT_ROUNDING[torch.get_float32_matmul_precision()]
    product = queries.norm(dim=1) * longest
    size: torch.Tensor = product if similarity == "inner_product" else 2 * product + longest**2
    return relative * size


def _best_of(
    query: torch.Tensor, vectors: torch.Tensor, rows: torch.Tensor, k: int, similarity: Similarity
) -> torch.Tensor:
    wide = query.double()
    pieces = []
    for part in torch.split(rows, math.ceil(_VALUES_PER_BLOCK / len(query))):
        near = vectors[part].double()
        pieces.append(
            (near * wide).sum(1) if similarity == "inner_product" else -(near - wide).square().sum(1)
        )
    order = torch.cat(pieces).float().sort(descending=True, stable=True).indices
    return rows[order[:k]]
