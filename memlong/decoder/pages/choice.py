"""Which pages of the retrieved tokens a token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Self

import torch
from torch import Tensor

_PAGE = 16
_CHANNELS = 0.5  # of a head's
_LARGEST = 127  # of eight bits
_PIECE = 1 << 19  # products computed at a time: on a CPU, what fits its caches


@dataclass(frozen=True)
class PageBudget:
    """How much of what is retrieved each token attends to.

    Attributes
    ----------
    tokens
        So many per K-V head, rounded down to whole pages, but at least one page.
    page_size
        Tokens that are chosen together.
    chunk_size
        Tokens of a chunk, which pages divide.
    """

    tokens: int
    page_size: int
    chunk_size: int

    @classmethod
    def of(cls, attended_tokens: int | None, chunk_size: int) -> Self | None:
        """Return the budget for chunks of this size; None if there is no limit."""
        return None if attended_tokens is None else cls(attended_tokens, gcd(_PAGE, chunk_size), chunk_size)

    @property
    def pages(self) -> int:
        """Number of pages, at least one."""
        return max(1, self.tokens // self.page_size)

    def covers(self, tokens: int) -> bool:
        """Whether so many retrieved tokens are all attended to."""
        return tokens <= self.pages * self.page_size


def kept_channels(head_dim: int) -> int:
    """Number of channels of a sketch."""
    return max(1, round(_CHANNELS * head_dim))


@torch.no_grad()
def energies(keys: Tensor) -> Tensor:
    """Return the energy of each channel of keys [..., tokens, head_dim]: [..., head_dim]."""
    return keys.square().sum(dim=-2, dtype=torch.float32)


def largest(energy: Tensor) -> Tensor:
    """Return the channels with the most energy [..., head_dim]: [..., kept], ascending."""
    channels: Tensor = energy.topk(kept_channels(energy.shape[-1]), sorted=False).indices.sort().values
    return channels


@torch.no_grad()
def sketched(keys: Tensor, channels: Tensor, budget: PageBudget) -> tuple[Tensor, Tensor]:
    """Keep channels [a, b, kept] of keys [a, b, tokens, head_dim], as a `Sketch` has them: its keys, and its scales."""
    some = keys.gather(3, channels[:, :, None].expand(-1, -1, keys.shape[2], -1)).float()
    # [a, b, chunks, pages of a chunk, page_size, kept] -> [a, b, chunks, kept, page_size, pages of a chunk]
    chunks = some.unflatten(2, (-1, budget.chunk_size // budget.page_size, budget.page_size)).transpose(3, 5)
    scales = chunks.abs().amax(dim=(4, 5)) / _LARGEST
    whole = (chunks / torch.where(scales > 0, scales, 1)[..., None, None]).round()
    return whole.clamp(-_LARGEST, _LARGEST).to(torch.int8).contiguous(), scales


@dataclass(frozen=True)
class Sketch:
    """Some channels of keys, in eight bits.

    Attributes
    ----------
    channels
        [rows, kv_heads, kept].
    keys
        int8 [rows, kv_heads, chunks, kept, page_size, pages of a chunk].
    scales
        What to multiply them by, float32 [rows, kv_heads, chunks, kept].
    """

    channels: Tensor
    keys: Tensor
    scales: Tensor

    @classmethod
    def of(cls, keys: Tensor, budget: PageBudget) -> Self:
        """Keep the largest channels of keys [rows, kv_heads, tokens, head_dim], rotated as attention reads them."""
        channels = largest(energies(keys))
        return cls(channels, *sketched(keys, channels, budget))

    @property
    def pages(self) -> int:
        """Number of pages."""
        return self.keys.shape[2] * self.keys.shape[5]


@torch.no_grad()
def choose_pages(query: Tensor, sketch: Sketch, budget: PageBudget, visible: Tensor | None = None) -> Tensor:
    """Return the pages with the largest share of attention, by the sketch: [rows, kv_heads, queries, pages].

    A page is judged by its largest logit. A K-V head's query heads choose together: their shares are added.

    Parameters
    ----------
    query
        [rows, kv_heads, group, queries, head_dim], scaled.
    sketch
        Of the retrieved keys.
    budget
        How many pages.
    visible
        Which pages a query may choose [rows, queries, pages]; None for all. One that has too few chooses others.
    """
    rows, kv_heads, group, queries, _ = query.shape
    asked = _asked_of(query, sketch).mT
    hidden = None if visible is None else ~visible.mT[:, :, None]  # [rows, pages, 1, queries]
    count = min(budget.pages, sketch.pages)
    if rows * kv_heads * group * queries * sketch.pages * budget.page_size <= _PIECE:
        true = sketch.keys.flatten(4).to(query.dtype) * sketch.scales.to(query.dtype)[..., None]
        products = (true.mT @ asked[:, :, None]).unflatten(3, sketch.keys.shape[4:])
        best = products.amax(dim=3).flatten(2, 3)  # [rows, kv_heads, pages, group * queries]
        return _chosen(best, None if hidden is None else hidden[:, None], group, count)
    chosen = torch.empty(rows, kv_heads, queries, count, dtype=torch.int64, device=query.device)
    for row in range(rows):
        for head in range(kv_heads):
            best = _best_of_pages(sketch.keys[row, head], sketch.scales[row, head], asked[row, head])
            chosen[row, head] = _chosen(best, None if hidden is None else hidden[row], group, count)
    return chosen


def _asked_of(query: Tensor, sketch: Sketch) -> Tensor:
    """Return the sketch's channels of queries [rows, kv_heads, group, queries, head_dim].

    Returns [rows, kv_heads, group * queries, kept].
    """
    channels = sketch.channels[:, :, None, None].expand(-1, -1, *query.shape[2:4], -1)
    return query.gather(4, channels).flatten(2, 3)


def _best_of_pages(keys: Tensor, scales: Tensor, asked: Tensor) -> Tensor:
    """Return the largest product of each page [pages, queries], a few chunks at a time."""
    step = max(1, _PIECE // (asked.shape[1] * keys[0, 0].numel()))
    parts = []
    for some, factors in zip(keys.split(step), scales.split(step), strict=True):
        true = some.flatten(2).to(asked.dtype).mul_(factors.to(asked.dtype)[:, :, None])
        # [chunks, page_size, pages of a chunk, queries]
        products = (true.mT @ asked).unflatten(1, keys.shape[2:])
        parts.append(products.amax(dim=1).flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _chosen(best: Tensor, hidden: Tensor | None, group: int, count: int) -> Tensor:
    """Return pages [..., queries, count] with the largest shares, by best logits [..., pages, group * queries]."""
    logits = best.float().unflatten(-1, (group, -1))
    if hidden is not None:  # finite, so that a query that sees no page has shares, too
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    shares = logits.softmax(dim=-3).sum(dim=-2).mT
    chosen: Tensor = shares.contiguous().topk(count, sorted=False).indices
    return chosen
