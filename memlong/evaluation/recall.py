"""Recall of a bank's search against exact search over the same embeddings."""

from __future__ import annotations

from torch import Tensor

from memlong.bank import MemoryBank, whole_number


def recall_at_k(bank: MemoryBank, query: Tensor, scores: Tensor, k: int) -> float:
    """Return the share of the exact top-k that a search found, compared by score, so that ties count.

    Parameters
    ----------
    bank
        The bank that was searched, unchanged since.
    query
        The query's embedding [dim].
    scores
        Scores of the search results [found].
    k
        Number of results requested; at most the number of chunks in the bank counts.

    Returns
    -------
    float
        Between 0 and 1; 1 for an empty bank.

    Notes
    -----
    As in ann-benchmarks, a result counts if its score is at least the k-th best.
    """
    depth = min(whole_number("k", k, at_least=1), len(bank))
    if depth == 0:
        return 1.0
    threshold = bank.exact_search(query[None], depth).scores[0, -1]
    # Scores may differ in the last bits, depending on the order of summation.
    good = scores >= threshold - 1e-6 * threshold.abs()
    return min(1.0, float(good.sum()) / depth)
