"""Metrics, and the similarity that an index ranks by."""

from __future__ import annotations

from typing import Literal

from memlong.bank.index.exact import Similarity

Metric = Literal["cosine", "inner_product", "l2"]


def similarity_of(metric: Metric) -> Similarity:
    """Return what to rank by; under the cosine metric, embeddings are already normalized (or zero)."""
    return "l2" if metric == "l2" else "inner_product"
