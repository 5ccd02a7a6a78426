"""Page choice: a single token attends to a few pages of the retrieved tokens, each K-V head to its own.

While text is generated, attention is bound by reading keys and values from memory. So a token first compares its
queries with a sketch of the retrieved keys, those channels in which they are largest (as SparQ attention,
arXiv 2312.04985, does for queries), and then attends to the pages that promise most attention (as Quest,
arXiv 2406.10774, does by bounds). Local window and chosen pages share one softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Self

import torch
from torch import Tensor

_PAGE = 16
_CHANNELS = 0.5  # of a head's


@dataclass(frozen=True)
class PageBudget:
    """How much of what is retrieved a single token attends to.

    Attributes
    ----------
    tokens
        At most so many, per K-V head.
    page_size
        Tokens that are chosen together.
    """

    tokens: int
    page_size: int

    @classmethod
    def of(cls, attended_tokens: int | None, chunk_size: int) -> Self | None:
        """Return the budget for chunks of this size; None if there is no limit."""
        return None if attended_tokens is None else cls(attended_tokens, gcd(_PAGE, chunk_size))

    @property
    def pages(self) -> int:
        """Number of pages, at least one."""
        return max(1, self.tokens // self.page_size)


@dataclass(frozen=True)
class Sketch:
    """The largest channels of keys.

    Attributes
    ----------
    channels
        [rows, kv_heads, kept].
    keys
        [rows, kv_heads, tokens, kept].
    """

    channels: Tensor
    keys: Tensor

    @classmethod
    def of(cls, keys: Tensor) -> Self:
        """Keep half of the channels of keys [rows, kv_heads, tokens, head_dim], rotated as attention reads them."""
        kept = max(1, round(_CHANNELS * keys.shape[3]))
        energy = keys.square().mean(dim=2, dtype=torch.float32)
        channels = energy.topk(kept, sorted=False).indices.sort().values
        return cls(channels, keys.take_along_dim(channels[:, :, None], dim=3))


def choose_pages(query: Tensor, sketch: Sketch, budget: PageBudget, bias: Tensor | None) -> Tensor:
    """Return the pages with the largest share of attention, by the sketch: [rows, kv_heads, pages], ascending.

    A K-V head's query heads choose together: their shares are added.

    Parameters
    ----------
    query
        [rows, kv_heads, group, head_dim], scaled.
    sketch
        Of the retrieved keys.
    budget
        How many pages.
    bias
        Added to logits [rows, 1 or kv_heads, 1 or group, tokens], or None.
    """
    channels = sketch.channels[:, :, None].expand(-1, -1, query.shape[2], -1)
    logits = (query.gather(3, channels) @ sketch.keys.mT).float()
    if bias is not None:
        logits += bias
    by_page = logits.unflatten(3, (-1, budget.page_size)).logsumexp(dim=4)
    shares = by_page.softmax(dim=3).sum(dim=2)
    chosen: Tensor = shares.topk(min(budget.pages, shares.shape[2]), sorted=False).indices.sort().values
    return chosen


def attend_to_pages(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sketch: Sketch,
    budget: PageBudget,
    *,
    scale: float | None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attend with one token to pages of the retrieved tokens, which come first, and to all later ones.

    Parameters
    ----------
    query
        [rows, heads, 1, head_dim].
    key, value
        [rows, kv_heads, keys, head_dim].
    sketch
        Of the retrieved keys.
    budget
        How many of them.
    scale
        Factor of the products; None is 1 / sqrt(head_dim).
    bias
        Added to logits [rows, 1 or heads, 1, keys], or None.

    Returns
    -------
    Tensor
        [rows, 1, heads, head_dim], as attention functions of transformers return it.
    """
    rows, kv_heads, _, width = key.shape
    memory, size = sketch.keys.shape[2], budget.page_size
    query = query.view(rows, kv_heads, -1, width) * (width**-0.5 if scale is None else scale)
    if bias is not None:  # [rows, 1 or kv_heads, 1 or group, keys]
        bias = bias[:, :, 0].unflatten(1, (1, 1) if bias.shape[1] == 1 else (kv_heads, -1)).float()
    chosen = choose_pages(query, sketch, budget, None if bias is None else bias[..., :memory])
    row = torch.arange(rows, device=key.device)[:, None, None]
    head = torch.arange(kv_heads, device=key.device)[:, None]
    picked, local = zip(
        *(
            (
                states[:, :, :memory].unflatten(2, (-1, size))[row, head, chosen].flatten(2, 3),
                states[:, :, memory:],
            )
            for states in (key, value)
        ),
        strict=True,
    )
    logits = torch.cat([query @ picked[0].mT, query @ local[0].mT], dim=3).float()
    if bias is not None:
        columns = (chosen[..., None] * size + torch.arange(size, device=key.device)).flatten(2)[:, :, None]
        of_memory = bias[..., :memory].expand(-1, kv_heads, -1, -1)
        picked_bias = of_memory.take_along_dim(columns, dim=3)
        logits += torch.cat([picked_bias, bias[..., memory:].expand(*picked_bias.shape[:3], -1)], dim=3)
    weights = logits.softmax(dim=3).to(value.dtype)
    count = picked[0].shape[2]
    output: Tensor = weights[..., :count] @ picked[1] + weights[..., count:] @ local[1]
    return output.view(rows, 1, -1, value.shape[3])
