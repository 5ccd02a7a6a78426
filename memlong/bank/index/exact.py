"""Exact nearest-neighbour search, on any torch device, that float32 rounding and ties cannot upset."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch

from memlong.bank.arrays import Floats, Ids
from memlong.bank.store.copying import to_device

Similarity = Literal["inner_product", "l2"]

ROWS_PER_COPY = 3
"""How many rows are read one after another while one is copied next to others."""

_MARGIN = 16
_SCORES_PER_BLOCK = 1 << 24
_BLOCK = 32
_SCORES_FOR_BLOCKS = 1 << 18  # fewer are sooner sorted than the blocks found
_VALUES_PER_BLOCK = 1 << 22
_VALUES_PER_GATHER = 1 << 18
_COARSEST = 2.0**-7
_INPUT_ROUNDING = {"none": 0.0, "ieee": 0.0, "tf32": 2.0**-10, "bf16": _COARSEST}


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
    rounded: Floats = scores.astype(np.float32)
    return rounded


def nearest_rows(
    queries: torch.Tensor,
    vectors: torch.Tensor,
    squared_norms: torch.Tensor,
    k: int,
    similarity: Similarity,
    *,
    longest: float | None = None,
    among: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return rows among which the true k best of each query certainly are.

    One float32 product scores every row. Its error is bounded (Higham, Accuracy and Stability of Numerical
    Algorithms, section 3.1), so if the best k + 16 rows reach further down than that error can, they hold the
    true k best, ties included, and those of them that lie within it are returned. Where they do not (many
    equal or nearly equal rows), every row in doubt is scored again in float64.

    Parameters
    ----------
    queries : torch.Tensor
        float32 [q, dim], on the device of the vectors or, which spares a wait for it, on the CPU.
    vectors : torch.Tensor
        float32 [n, dim].
    squared_norms : torch.Tensor
        float32 [n], the squared length of each vector, on its device. Only "l2" reads them, if `longest` is known.
    k : int
        1 <= k <= n, or the number of rows in `among`.
    similarity : "inner_product" or "l2"
        What to rank by.
    longest : float, optional
        A length that no vector exceeds, where it is known.
    among : torch.Tensor, optional
        int64 [m], m >= 1, ascending, on the device of the vectors: the only rows to look at.

    Returns
    -------
    torch.Tensor
        int64 [q, c] row numbers on the CPU, c >= k; -1 is no row.
    """
    count = len(vectors) if among is None else len(among)
    width = min(count, k + _MARGIN)
    block = max(1, _SCORES_PER_BLOCK // count)
    if longest is None:
        longest = math.sqrt(squared_norms.max().item())
    pieces = []
    for start in range(0, len(queries), block):
        given = queries[start : start + block]
        part = to_device(given, vectors.device)
        scores = _coarse_scores(part, vectors, squared_norms, similarity, among)
        values, columns = largest(scores, width)
        best, rows = _on_cpu(values, columns if among is None else among[columns])
        if width < count:
            lower = best[:, k - 1] - 2 * _score_error(given, vectors.device, longest, similarity)
            too_low = best < lower[:, None]
            rows[too_low] = -1
            for unsure in np.flatnonzero(~too_low[:, -1]).tolist():
                in_doubt = (scores[unsure] >= float(lower[unsure])).nonzero()[:, 0]
                in_doubt = in_doubt if among is None else among[in_doubt]
                rows[unsure] = -1
                rows[unsure, :k] = _best_of(part[unsure], vectors, in_doubt, k, similarity).cpu().numpy()
        pieces.append(rows)
    found = np.concatenate(pieces) if pieces else np.empty((0, width), dtype=np.int64)
    return torch.from_numpy(found[:, : np.count_nonzero((found >= 0).any(axis=0))])


def largest(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest of each row, in descending order, and their columns, as `Tensor.topk` does.

    Where there are many, only those blocks of columns are looked through that have the largest maxima: as many as are
    wanted certainly hold them all.

    Parameters
    ----------
    scores : torch.Tensor
        float32 [q, n].
    count : int
        How many, <= n.
    """
    blocks = scores.shape[1] // _BLOCK
    if scores.numel() < _SCORES_FOR_BLOCKS or blocks < 2 * count:
        found = scores.topk(count, dim=1)
        return found.values, found.indices
    whole = scores[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK))
    promising = whole.amax(dim=2).topk(count, dim=1).indices
    values = whole[
        torch.arange(len(scores), dtype=torch.long, device=scores.device)[:, None], promising
    ].flatten(1)
    best = torch.cat([values, scores[:, blocks * _BLOCK :]], dim=1).topk(count, dim=1)
    looked_through = torch.nn.functional.pad(
        promising, (0, 1), value=blocks
    )  # the last one is what is left over
    return best.values, looked_through.gather(1, best.indices // _BLOCK) * _BLOCK + best.indices % _BLOCK


def _on_cpu(scores: torch.Tensor, columns: torch.Tensor) -> tuple[Floats, Ids]:
    """Return float32 scores and int64 columns in one copy: each waits for the device."""
    if scores.device.type == "cpu":
        return scores.numpy(), columns.numpy()
    both = torch.stack([scores.contiguous().view(torch.int32).long(), columns]).cpu().numpy()
    return both[0].astype(np.int32).view(np.float32), both[1]


def _coarse_scores(
    queries: torch.Tensor,
    vectors: torch.Tensor,
    squared_norms: torch.Tensor,
    similarity: Similarity,
    among: torch.Tensor | None = None,
) -> torch.Tensor:
    if among is not None:
        return _coarse_scores_among(queries, vectors, squared_norms, similarity, among)
    # Autocast leaves alone what has an `out`, and costs nothing so.
    products = torch.empty(len(queries), len(vectors), dtype=torch.float32, device=vectors.device)
    if len(queries) == 1:
        torch.mv(vectors, queries[0], out=products[0])
    else:
        torch.mm(queries, vectors.T, out=products)
    if similarity == "l2":
        products.mul_(2).sub_(squared_norms)
    return products


def _coarse_scores_among(
    queries: torch.Tensor,
    vectors: torch.Tensor,
    squared_norms: torch.Tensor,
    similarity: Similarity,
    among: torch.Tensor,
) -> torch.Tensor:
    first, last = int(among[0]), int(among[-1]) + 1
    if last - first <= ROWS_PER_COPY * len(among):
        scores = _coarse_scores(queries, vectors[first:last], squared_norms[first:last], similarity)
        return scores if len(among) == last - first else scores[:, among - first]
    parts = [
        _coarse_scores(queries, vectors.index_select(0, rows), squared_norms[rows], similarity)
        for rows in torch.split(among, math.ceil(_VALUES_PER_GATHER / vectors.shape[1]))
    ]
    return torch.cat(parts, dim=1)


def _score_error(
    queries: torch.Tensor, device: torch.device, longest: float, similarity: Similarity
) -> Floats:
    rounding = (queries.shape[1] + 8) * 2.0**-24
    relative = rounding / (1 - rounding) + 2 * input_rounding(device)
    product: Floats = torch.linalg.vector_norm(queries, dim=1).cpu().numpy() * longest
    return relative * (product if similarity == "inner_product" else 2 * product + longest**2)


def input_rounding(device: torch.device) -> float:
    """Return how much torch, as it is set now, may round what it multiplies on a device, relative to its size."""
    # Not by get_float32_matmul_precision: it raises once anyone has set these.
    backends = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}
    if device.type not in backends:
        return _COARSEST
    return _INPUT_ROUNDING.get(backends[device.type].matmul.fp32_precision, _COARSEST)


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
