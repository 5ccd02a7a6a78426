"""The model's own full attention, as a teacher of what its memory should make it predict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlong.bank.store.copying import to_device
from memlong.decoder import MemoryDecoder
from memlong.decoder.model.attention import evaluating

_PIECE = 512  # tokens read at a time, as all their logits are needed
_MOST_LIKELY = 64  # next tokens of which probabilities are kept


@dataclass(frozen=True)
class Lesson:
    """What full attention predicts after each token of a batch.

    Attributes
    ----------
    ids
        [rows, tokens, k], int64: the likeliest next tokens.
    log_probs
        [rows, tokens, k], float32: their log-probabilities.
    losses
        [rows, tokens], float32: the negative log-likelihood of the next token that stands there, 0 for the last.
    """

    ids: Tensor
    log_probs: Tensor
    losses: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, decoder: MemoryDecoder, input_ids: Tensor) -> Self:
        """Let a decoder's model, without adapters and memory, read token ids [rows, tokens], padded on the right.

        A model that carries recurrent states reads all tokens at once, with all their logits: some implementations
        cannot continue from their states with several tokens.
        """
        model = decoder.model
        input_ids = to_device(input_ids, model.device)
        size = input_ids.shape[1] if decoder.model_layout.states else _PIECE
        coming = torch.cat([input_ids[:, 1:], input_ids[:, :1]], dim=1)
        cache, parts = None, []
        with _plain(model), evaluating(model):
            for piece, following in zip(input_ids.split(size, dim=1), coming.split(size, dim=1), strict=True):
                output = model(input_ids=piece, past_key_values=cache, use_cache=size < input_ids.shape[1])
                cache = output.past_key_values
                log_probs = output.logits.float().log_softmax(dim=-1)
                best = log_probs.topk(min(_MOST_LIKELY, log_probs.shape[-1]), dim=-1)
                losses = -log_probs.gather(-1, following[..., None])[..., 0]
                parts.append((best.indices, best.values, losses))
        ids, values, losses = (torch.cat(some, dim=1) for some in zip(*parts, strict=True))
        losses[:, -1] = 0
        return cls(ids, values, losses)

    @staticmethod
    def calls(decoder: MemoryDecoder, tokens: int) -> int:
        """How often `of` runs the model over rows of so many tokens."""
        return min(tokens, 1) if decoder.model_layout.states else -(-tokens // _PIECE)

    def at(self, places: Tensor) -> Lesson:
        """Return what is predicted at some places [rows, some]."""
        deep = places[..., None].expand(-1, -1, self.ids.shape[-1])
        return Lesson(self.ids.gather(1, deep), self.log_probs.gather(1, deep), self.losses.gather(1, places))

    def divergence(self, logits: Tensor) -> Tensor:
        """Return the Kullback-Leibler divergence [rows, tokens] of predictions from these, in nats.

        Tokens beyond the likeliest count as one.
        """
        all_log_probs = logits.float().log_softmax(dim=-1)
        theirs = all_log_probs.gather(-1, self.ids)
        ours_rest, theirs_rest = _rest(self.log_probs), _rest(theirs)
        each = (self.log_probs.exp() * (self.log_probs - theirs)).sum(dim=-1)
        return each + ours_rest.exp() * (ours_rest - theirs_rest)


def _rest(log_probs: Tensor) -> Tensor:
    """Return the log-probability of everything else [...]."""
    return (1 - log_probs.exp().sum(dim=-1)).clamp(min=1e-7).log()


@contextmanager
def _plain(model: PreTrainedModel) -> Iterator[None]:
    if not getattr(model, "_hf_peft_config_loaded", False):
        yield
        return
    learning = [parameter.requires_grad for parameter in model.parameters()]
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
        for parameter, learns in zip(model.parameters(), learning, strict=True):
            parameter.requires_grad_(learns)  # peft makes all of an adapter's learn
