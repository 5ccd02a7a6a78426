"""The shape that all K-V blocks of one bank share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from memlong.errors import InvalidArgumentError


@dataclass(frozen=True)
class ChunkLayout:
    """Shape, dtype and device of one chunk's keys; its values have the same.

    Attributes
    ----------
    shape : tuple of int
        (layers, kv_heads, chunk, head_dim).
    dtype : torch.dtype
        A float dtype.
    device : torch.device
        Where blocks are taken in and returned.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, keys: torch.Tensor) -> ChunkLayout:
        """Return the layout of blocks [n, layers, kv_heads, chunk, head_dim]."""
        return cls(tuple(keys.shape[1:]), keys.dtype, keys.device)

    @property
    def nbytes(self) -> int:
        """Bytes of one chunk's keys and values together."""
        return 2 * math.prod(self.shape) * self.dtype.itemsize

    def require_same(self, other: ChunkLayout) -> None:
        """Raise InvalidArgumentError, naming the first difference, unless `other` equals this layout."""
        for what in ("shape", "dtype", "device"):
            ours, theirs = getattr(self, what), getattr(other, what)
            if ours != theirs:
                raise InvalidArgumentError(
                    f"keys and values must have the chunk {what} of the bank's first add, {ours}, got {theirs}: "
                    "one bank holds chunks of one kind, and reset() lets it take another"
                )

    def empty(self, *leading: int) -> torch.Tensor:
        """Return zeros [*leading, *shape]."""
        return torch.zeros(*leading, *self.shape, dtype=self.dtype, device=self.device)


UNKNOWN = ChunkLayout((0, 0, 0, 0), torch.float32, torch.device("cpu"))
"""The layout of a bank to which nothing was added."""
