"""Recall of a bank's search, against exact search over the same embeddings."""

from __future__ import annotations

from torch import Tensor

from memlong.bank import MemoryBank, whole_number


def recall_at_k(bank: MemoryBank, query: Tensor, scores: Tensor, k: int) -> float:
    """Share of the exact top-k that a search returned, by score rather than by id, so that ties do no harm.

    Parameters
    ----------
    bank
        The bank that was searched, with the content it had then.
    query
        The query's embedding [dim].
    scores
        Of what the search returned [found].
    k
        How many were asked for; where the bank holds fewer chunks, that many count.

    Returns
    -------
    float
        Between 0 and 1; 1 for an empty bank.

    Notes
    -----
    Tie-safe recall as ann-benchmarks counts it: a result counts if it is as good as the k-th best.
    """
    depth = min(whole_number("k", k, at_least=1), len(bank))
    if depth == 0:
        return 1.0
    threshold = bank.exact_search(query[None], depth).scores[0, -1]
    # One query's scores may differ in the last bits between two ways to sum.
    good = scores >= threshold - 1e-6 * threshold.abs()
    return min(1.0, float(good.sum()) / depth)
