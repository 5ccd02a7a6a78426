"""A prior for the latest chunks, as a part of an embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from memlong.decoder.retrievers.base import Passage

_FREQUENCIES = 128
_FASTEST = 3.5  # of the frequencies, times the scale; the Gaussian has hardly any beyond


class RecencyPrior:
    """Ranks chunks by cosine + ``weight`` * exp(-distance² / (2 ``scale``²)), distance in tokens from chunk to query.

    An index compares a chunk and a query by one product, so the second term must be one too. It is a Fourier series of
    the distance, and the cosine of a difference is a product of what a cosine and a sine make of either position. Up to
    220 scales it is within 0.001 of the Gaussian; but a series comes round: around 230 scales chunks lose as much as
    the latest gain, around 460 they gain as much.

    Parameters
    ----------
    weight
        What a chunk right before the query gains, cosines being from -1 to 1.
    scale
        Tokens over which that falls to 0.61 of it; over twice as many, to 0.14.

    Notes
    -----
    Features for shift-invariant kernels: Rahimi and Recht, "Random features for large-scale kernel machines", 2007.
    Here the frequencies are evenly spaced instead of random, which makes them exact for all distances that matter.
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
        """How much wider it makes embeddings."""
        return 2 * _FREQUENCIES if self._weight else 0

    def extend(self, embeddings: Tensor, passages: Sequence[Passage]) -> Tensor:
        """Make embeddings [passages, dim] unit vectors, and add to them where their passages end.

        Returns float32 [passages, dim + width], to be compared by their cosine; without weight, what was given.
        """
        if not self._weight:
            return embeddings
        ends = torch.tensor([passage.end for passage in passages], dtype=torch.float64, device="cpu")
        angles = ends[:, None] * self._frequencies
        places = torch.cat([angles.cos() * self._sizes, angles.sin() * self._sizes], dim=1)
        return torch.cat([normalize(embeddings, dim=1), places.float()], dim=1)
