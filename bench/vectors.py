"""Random vectors in clusters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

K = 8
PART = 512  # vectors added at a time while building an index


@dataclass(frozen=True, eq=False)
class Data:
    """Float32 unit vectors [n, dim]: stored from the start, to add later, and queries with their K-th best scores."""

    stored: np.ndarray
    new: np.ndarray
    queries: np.ndarray
    least: np.ndarray

    @classmethod
    def drawn(cls, count: int, dim: int, new: int, queries: int) -> Data:
        """Draw vectors of each kind around cluster centers."""
        rng = np.random.default_rng(0)
        centers = rng.standard_normal((max(count // 50, 16), dim), dtype=np.float32)
        vectors = rng.standard_normal((count + new + queries, dim), dtype=np.float32)
        for part in np.array_split(vectors, max(len(vectors) // PART, 1)):
            part += centers[rng.integers(0, len(centers), len(part))]
            part /= np.linalg.norm(part, axis=1, keepdims=True)
        stored, added, asked = np.split(vectors, [count, count + new])
        best = [np.partition(query @ stored.T, -min(K, count))[-min(K, count)] for query in asked]
        return cls(stored, added, asked, np.array(best))

    def recall(self, ids: np.ndarray) -> float:
        """Return the share of found ids [queries, K] that score at least as well as the true K-th best."""
        scores = np.einsum("qd,qkd->qk", self.queries, self.stored[ids])
        return float(((ids >= 0) & (scores >= self.least[:, None] - 1e-6)).mean())
