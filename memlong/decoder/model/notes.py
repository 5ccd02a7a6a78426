"""Notes of a forward call: what share of attention its tokens give to each retrieved token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memlong.bank.store.copying import to_device


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
        self, layer: int, query: Tensor, key: Tensor, mask: Tensor, scale: float | None, memory: int
    ) -> None:
        """Note the shares that a softmax of scaled products gives to the first ``memory`` keys.

        Parameters
        ----------
        layer
            The retrieval layer.
        query
            [rows, heads, queries, head_dim].
        key
            [rows, kv_heads, keys, head_dim].
        mask
            What is added to the products [rows, 1 or heads, queries, keys].
        scale
            Their factor; None is 1 / sqrt(head_dim).
        memory
            Retrieved tokens, which come first.
        """
        latest = min(self.latest, query.shape[2])
        first = query.shape[2] - latest
        group = query.shape[1] // key.shape[1]
        scale = query.shape[3] ** -0.5 if scale is None else scale
        for head in range(key.shape[1]):  # one after the other: there may be many keys
            mine = slice(head * group, (head + 1) * group)
            asked, keys = query[:, mine, first:].float() * scale, key[:, head, None].float()
            hidden = mask[:, :, first:] if mask.shape[1] == 1 else mask[:, mine, first:]
            logits = asked @ keys.mT + hidden.float()
            self.give(layer, (logits[..., :memory] - logits.logsumexp(dim=3, keepdim=True)).exp())

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
