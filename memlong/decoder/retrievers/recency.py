"""A recency prior, encoded as extra dimensions of an embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from memlong.decoder.retrievers.base import Passage

_FREQUENCIES = 128
_FASTEST = 3.5  # highest frequency times the scale; the Gaussian's spectrum is negligible beyond


class RecencyPrior:
    """Ranks chunks by cosine + ``weight`` * exp(-distance² / (2 ``scale``²)), distance in tokens from chunk to query.

    An index compares chunk and query by one inner product, so the second term must be one, too. It is a Fourier series
    in the distance, and the cosine of a difference is an inner product of cosines and sines of the two positions. Up
    to 220 scales it is within 0.001 of the Gaussian. But the series is periodic: around 230 scales, chunks get the
    full weight as a penalty, and around 460 as a bonus.

    Parameters
    ----------
    weight
        Bonus of a chunk right before the query, on the scale of cosines (-1 to 1).
    scale
        Distance in tokens at which the bonus falls to 0.61 of ``weight``; at twice the distance, to 0.14.

    Notes
    -----
    Features for shift-invariant kernels: Rahimi and Recht, "Random features for large-scale kernel machines", 2007.
    Here frequencies are evenly spaced instead of random, which is exact for all distances of interest.
    """

    def __init__(self, weight: float, scale: float) -> None:
        self._weight = weight
        steps = (
            (torch.arange(_FREQUENCIES, dtype=torch.float64, device="cpu") + 0.5) * _FASTEST / _FREQUENCIES
        )
        density = (-steps.square() / 2).exp()
        self._frequencies = steps / scale
        self._sizes = (weight * density / density.sum()).sqrt()

    @property
    def width(self) -> int:
        """Number of dimensions added to embeddings."""
        return 2 * _FREQUENCIES if self._weight else 0

    def extend(self, embeddings: Tensor, passages: Sequence[Passage]) -> Tensor:
        """Normalize embeddings [passages, dim] and append an encoding of their passages' end positions.

        Returns float32 [passages, dim + width], to be compared by cosine; with weight 0, the embeddings unchanged.
        """
        if not self._weight:
            return embeddings
        ends = torch.tensor([passage.end for passage in passages], dtype=torch.float64, device="cpu")
        angles = ends[:, None] * self._frequencies
        places = torch.cat([angles.cos() * self._sizes, angles.sin() * self._sizes], dim=1)
        return torch.cat([normalize(embeddings, dim=1), places.float()], dim=1)
