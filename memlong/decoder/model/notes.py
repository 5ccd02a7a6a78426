"""Notes of a forward call: what share of attention its tokens give to each retrieved token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memlong.bank.store.copying import to_device

_PIECE = 1 << 22  # products computed at a time


@dataclass(eq=False)
class AttentionNotes:
    """How much of their attention the tokens of one forward call give to retrieved tokens.

    Parameters
    ----------
    weights
        How often each of the call's latest tokens counts [rows, tokens], float32; those before them do not.

    Attributes
    ----------
    asked
        By retrieval layer, how many pairs of a query head and a token of a row count [rows].
    given
        By retrieval layer, the sum over these pairs of what they give to each retrieved token [rows, memory].
    """

    weights: Tensor
    asked: dict[int, Tensor] = field(default_factory=dict)
    given: dict[int, Tensor] = field(default_factory=dict)

    @property
    def latest(self) -> int:
        """How many of the latest tokens may count."""
        return self.weights.shape[1]

    def ask(self, layer: int, heads: int, queries: int) -> None:
        """Note that these many heads of a layer ask, for the latest ``queries`` tokens of the call."""
        _add(self.asked, layer, heads * self._of(queries).sum(dim=1))

    def give(self, layer: int, shares: Tensor) -> None:
        """Note shares of attention [rows, heads, queries, memory] of some heads, for the call's latest tokens."""
        weights = self._of(shares.shape[2]).to(shares.device)
        shares = shares.detach()[:, :, shares.shape[2] - weights.shape[1] :]
        _add(self.given, layer, torch.einsum("rhqm,rq->rm", shares.to(weights.dtype), weights))

    @torch.no_grad()
    def give_by_softmax(
        self,
        layer: int,
        query: Tensor,
        keys: Sequence[Tensor],
        mask: Tensor,
        scale: float | None,
        memory: int,
    ) -> None:
        """Note the shares that a softmax of scaled products gives to the first ``memory`` keys.

        Parameters
        ----------
        layer
            The retrieval layer.
        query
            [rows, heads, queries, head_dim].
        keys
            Consecutive parts of them [rows, kv_heads, keys, head_dim].
        mask
            What is added to the products [rows, 1 or heads, queries, keys].
        scale
            Their factor; None is 1 / sqrt(head_dim).
        memory
            Retrieved tokens, which come first.
        """
        rows, kv_heads = keys[0].shape[:2]
        scale = query.shape[3] ** -0.5 if scale is None else scale
        first = query.shape[2] - min(self.latest, query.shape[2])
        asked = (query[:, :, first:].float() * scale).unflatten(1, (kv_heads, -1))
        group, latest = asked.shape[2:4]
        asked = asked.flatten(2, 3)  # so that a product copies no keys
        mask = mask[:, :, first:].unflatten(1, (kv_heads if mask.shape[1] > 1 else 1, -1))
        step = max(1, _PIECE // (rows * group * latest * mask.shape[4]))
        for start in range(0, kv_heads, step):
            some = slice(start, start + step)
            products = torch.cat([asked[:, some] @ part[:, some].float().mT for part in keys], dim=3)
            # [rows, kv_heads, group, queries, keys]
            logits = products.unflatten(2, (group, latest)) + (mask if mask.shape[1] == 1 else mask[:, some])
            self.give(layer, logits.softmax(dim=4)[..., :memory].flatten(1, 2))

    def of_rows(self, rows: Sequence[int], tokens: int) -> AttentionNotes:
        """Return notes for these rows alone, of which the call has this many tokens."""
        return AttentionNotes(self.weights[list(rows), max(0, self.latest - tokens) :])

    def join(self, rows: Sequence[int], part: AttentionNotes) -> None:
        """Add the notes of these rows."""
        where = to_device(torch.tensor(list(rows), device="cpu"), self.weights.device)
        for mine, theirs in ((self.asked, part.asked), (self.given, part.given)):
            for layer, each in theirs.items():
                whole = each.new_zeros(len(self.weights), *each.shape[1:])
                _add(mine, layer, whole.index_copy(0, where, each))

    def _of(self, queries: int) -> Tensor:
        """The weights of the call's latest ``queries`` tokens, if so many may count."""
        return self.weights[:, max(0, self.latest - queries) :]


def _add(sums: dict[int, Tensor], layer: int, more: Tensor) -> None:
    sums[layer] = sums[layer] + more if layer in sums else more
