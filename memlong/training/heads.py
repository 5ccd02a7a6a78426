"""Find retrieval heads: the K-V heads whose output changes most when their tokens see beyond a local window.

Only some heads look far back; the others do as well with sinks and the latest tokens (DuoAttention, arXiv 2410.10819,
learns which). Here a head's score is measured in one pass over some text, without gradients: the mean square of what
full attention adds to the residual stream through this head, over attention within a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlong.bank.store.copying import to_device
from memlong.decoder.model import kernels
from memlong.decoder.model.head_names import Heads
from memlong.decoder.model.kernels import Attend, Output
from memlong.decoder.model.layer_names import parse_layers, ranges
from memlong.decoder.model.probe import probe
from memlong.errors import InvalidArgumentError, UnsupportedModelError
from memlong.training.projections import ProjectionWatch


@dataclass(frozen=True)
class HeadScores:
    """How much each K-V head of some layers makes of distant tokens.

    Attributes
    ----------
    layers
        The layers, ascending.
    scores
        [layers, kv_heads]: mean square of the change in the residual stream.
    """

    layers: tuple[int, ...]
    scores: Tensor

    def best(self, share: float) -> Heads:
        """Return this share of all heads, at least one: those with the highest scores, by layer."""
        if not 0 < share <= 1:
            raise InvalidArgumentError(f"share must be above 0 and at most 1, got {share}")
        count = max(1, round(share * self.scores.numel()))
        chosen = torch.zeros(self.scores.numel(), dtype=torch.bool)
        chosen[self.scores.flatten().argsort(descending=True, stable=True)[:count]] = True
        each = zip(self.layers, chosen.view_as(self.scores), strict=True)
        return {layer: tuple(heads.nonzero()[:, 0].tolist()) for layer, heads in each if heads.any()}


def score_heads(
    model: PreTrainedModel,
    passages: Sequence[Tensor],
    *,
    layers: str = "all",
    local_window: int = 1024,
    sink_tokens: int = 4,
    progress: Callable[[int], None] | None = None,
) -> HeadScores:
    """Score the K-V heads of a model by what distant tokens change in their output.

    Parameters
    ----------
    model
        A model that memory can be attached to.
    passages
        Token ids [1, tokens] of text, each several times as long as ``local_window``.
    layers
        The retrieval layers, as in `MemoryConfig`.
    local_window, sink_tokens
        Tokens that a head without memory attends to: the latest, and the first of the text.
    progress
        Called with the number of tokens in each passage.

    Raises
    ------
    InvalidArgumentError
        If a passage is not longer than the window, or a layer does not exist.
    UnsupportedModelError
        If memory does not attach to the model, or its attention has no K-V heads of one shape, or no linear output
        projection.
    """
    layout = probe(model)
    chosen = parse_layers(layers, layout.full_attention_layers, layout.layers)
    if not layout.alike(chosen) or any(layout.layers[layer].is_made for layer in chosen):
        raise UnsupportedModelError(
            f"Retrieval heads need layers that attend to K-V heads of one shape, but {type(model).__name__} has others "
            f"among the layers {ranges(chosen)}: choose layers of one shape, or leave retrieval_heads at 'all'"
        )
    least = local_window + sink_tokens
    for passage in passages:
        if not isinstance(passage, Tensor) or passage.ndim != 2 or passage.shape[1] <= least:
            raise InvalidArgumentError(
                f"passages must be tensors of token ids [1, tokens] with more than {least} tokens, to see beyond the "
                f"local window, got {f'shape {tuple(passage.shape)}' if isinstance(passage, Tensor) else passage!r:.80}"
            )
    if not passages:
        raise InvalidArgumentError("passages must hold at least one, got none")
    watch = _Watch(layout, chosen, local_window, sink_tokens)
    device = cast("torch.device", model.get_input_embeddings().weight.device)
    for passage in passages:
        watch.read(model, to_device(passage.long(), device))
        if progress is not None:
            progress(passage.shape[1])
    return HeadScores(chosen, watch.scores())


@dataclass(eq=False)
class _Watch(ProjectionWatch):
    """Records, by layer and K-V head, the second moments of what distant tokens change in attention's output."""

    local_window: int
    sink_tokens: int
    # By layer, [kv_heads, group * width, group * width], float64.
    _moments: dict[int, Tensor] = field(default_factory=dict, init=False)
    _tokens: int = field(default=0, init=False)

    @torch.no_grad()
    def read(self, model: PreTrainedModel, passage: Tensor) -> None:
        """Run the model on a passage [1, tokens]."""
        index = torch.arange(passage.shape[1], device=passage.device)
        distance = index[:, None] - index
        near = (distance < self.local_window) | (index < self.sink_tokens)
        self._mask = kernels.additive_mask(((distance >= 0) & near)[None], model.dtype)
        self._tokens += passage.shape[1] - self.local_window
        self.run(model, passage)

    def attend(
        self,
        base: Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> Output:
        """Compute the model's own attention, and note its difference to attention within the window."""
        output, weights = base(module, query, key, value, attention_mask, **options)
        layer = self.layout.readers[module][-1]
        if layer in self.layers:
            local, _ = kernels.attend_with_mask(base, module, query, key, value, self._mask, options)
            added = (output - local)[0, self.local_window :].double()  # [tokens, heads, width]
            by_head = added.view(len(added), key.shape[1], -1).transpose(
                0, 1
            )  # [kv_heads, tokens, group * width]
            moments = (by_head.mT @ by_head).cpu()
            self._moments[layer] = self._moments.get(layer, 0) + moments
        return output, weights

    def scores(self) -> Tensor:
        """Mean squares of the change in the residual stream, float32 [layers, kv_heads]."""
        found = []
        for layer in self.layers:
            moments = self._moments[layer] / self._tokens
            into = (
                self.projections[layer].double().T.reshape(*moments.shape[:2], -1)
            )  # [kv_heads, group * width, hidden]
            found.append(torch.einsum("hij,hik,hjk->h", moments, into, into))
        return torch.stack(found).float()
