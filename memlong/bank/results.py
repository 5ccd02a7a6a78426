"""What a bank returns: frozen records of tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The best k chunks of each query, best first; equal scores in ascending id order.

    Attributes
    ----------
    scores : torch.Tensor
        float32 [q, k] on the CPU; higher is better for every metric (L2 is the negative squared distance);
        -inf where a query has fewer than k chunks.
    ids : torch.Tensor
        int64 [q, k] on the CPU; -1 where a query has fewer than k chunks.
    """

    scores: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True, eq=False)
class Retrieved:
    """The best k chunks of each query with their keys, values and token spans.

    Attributes
    ----------
    ids : torch.Tensor
        int64 [q, k] on the CPU; -1 is missing.
    scores : torch.Tensor
        float32 [q, k] on the CPU; -inf is missing.
    keys, values : torch.Tensor
        [q, k, layers, kv_heads, chunk, head_dim] in the dtype and on the device they came in; missing chunks
        are zeros. A bank that does not know its chunk shape yet (nothing added since it was made or reset)
        returns [q, k, 0, 0, 0, 0] in float32 on the CPU.
    spans : torch.Tensor
        int64 [q, k, 2] on the CPU, token positions [start, end) of each chunk; -1 is missing.
    """

    ids: torch.Tensor
    scores: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    spans: torch.Tensor

    @property
    def found(self) -> torch.Tensor:
        """Bool [q, k], true where there is a chunk."""
        return self.ids >= 0


@dataclass(frozen=True, eq=False)
class Chunks:
    """Chunks by id: those asked for that the bank holds, in the order asked for.

    Attributes
    ----------
    ids : torch.Tensor
        int64 [n] on the CPU.
    keys, values : torch.Tensor
        [n, layers, kv_heads, chunk, head_dim] in the dtype and on the device they came in.
    spans : torch.Tensor
        int64 [n, 2] on the CPU, token positions [start, end) of each chunk.
    """

    ids: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    spans: torch.Tensor


@dataclass(frozen=True, eq=False)
class StoredEmbeddings:
    """A copy of what a bank searches, at one moment.

    Attributes
    ----------
    ids : torch.Tensor
        int64 [n], ascending.
    embeddings : torch.Tensor
        float32 [n, dim] on the CPU, as stored: of unit length (or zero) under the cosine metric.
    """

    ids: torch.Tensor
    embeddings: torch.Tensor
