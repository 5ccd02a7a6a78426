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
from memlong.bank.validate import whole_number
from memlong.decoder.model import kernels
from memlong.decoder.model.head_names import has_plain_heads
from memlong.decoder.model.kernels import Attend, Output
from memlong.decoder.model.layer_names import heads_as_text, parse_layers, ranges
from memlong.decoder.model.probe import probe
from memlong.errors import InvalidArgumentError, UnsupportedModelError
from memlong.training.projections import ProjectionWatch, check_passages


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

    def best(self, share: float) -> str:
        """Return this share of all heads, at least one, for `MemoryConfig.retrieval_heads`: those that score highest.

        Raises
        ------
        InvalidArgumentError
            If ``share`` is not a number above 0 and at most 1.
        """
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise InvalidArgumentError(f"share must be a number above 0 and at most 1, got {share!r}")
        count = max(1, round(share * self.scores.numel()))
        chosen = torch.zeros_like(self.scores, dtype=torch.bool).flatten()
        chosen[self.scores.flatten().argsort(descending=True, stable=True)[:count]] = True
        each = zip(self.layers, chosen.view_as(self.scores), strict=True)
        return heads_as_text({layer: heads.nonzero()[:, 0].tolist() for layer, heads in each})

    def best_layers(self, count: int) -> str:
        """Return the layers whose heads score highest together, for `MemoryConfig.retrieval_layers`.

        Raises
        ------
        InvalidArgumentError
            If ``count`` is not a number from 1 to that of the layers.
        """
        count = whole_number("count", count, at_least=1, at_most=len(self.layers))
        order = self.scores.sum(dim=1).argsort(descending=True, stable=True)[:count]
        return ",".join(str(self.layers[place]) for place in order.sort().values.tolist())


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

    Returns
    -------
    HeadScores
        A score for each K-V head of these layers.

    Raises
    ------
    InvalidArgumentError
        If a passage is not token ids of the model, or not longer than the window, or longer than the trained positions;
        or a layer does not exist.
    UnsupportedModelError
        If memory does not attach to the model, or its attention has no K-V heads of one shape, or no linear output
        projection.
    """
    local_window = whole_number("local_window", local_window, at_least=1)
    sink_tokens = whole_number("sink_tokens", sink_tokens, at_least=0)
    layout = probe(model)
    chosen = parse_layers(layers, layout.full_attention_layers, layout.layers)
    if not has_plain_heads(layout, chosen):
        raise UnsupportedModelError(
            f"Retrieval heads need layers that each attend to K-V heads of their own, of one shape, but "
            f"{type(model).__name__} has others among the layers {ranges(chosen)}: leave retrieval_heads at 'all'"
        )
    check_passages(passages, layout)
    least, most = local_window + sink_tokens, layout.max_positions
    for passage in passages:
        if passage.shape[1] <= least or (most is not None and passage.shape[1] > most):
            limit = "" if most is None else f", and at most the {most} that the model was trained on"
            raise InvalidArgumentError(
                f"passages must have more than {least} tokens, to see beyond local_window{limit}, got "
                f"{passage.shape[1]}"
            )
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
        index = torch.arange(passage.shape[1], device=passage.device, dtype=torch.int32)
        distance = index[:, None] - index
        near = (distance < self.local_window) | (index < self.sink_tokens)
        self._masks = {
            size: kernels.additive_mask(
                ((distance >= 0) & near & (distance < (size or len(index))))[None], model.dtype
            )
            for size in {self.layout.layers[layer].sliding_window for layer in self.layers}
        }
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
            mask = self._masks[self.layout.layers[layer].sliding_window]
            local, _ = kernels.attend_with_mask(base, module, query, key, value, mask, options)
            # [tokens, heads, width]
            added = (output - local)[0, self.local_window :].float().cpu().double()
            # [kv_heads, tokens, group * width]
            by_head = added.view(len(added), key.shape[1], -1).transpose(0, 1)
            moments = by_head.mT @ by_head
            self._moments[layer] = self._moments.get(layer, 0) + moments
        return output, weights

    def scores(self) -> Tensor:
        """Mean squares of the change in the residual stream, float32 [layers, kv_heads]."""
        found = []
        for layer in self.layers:
            moments = self._moments[layer] / self._tokens
            # [kv_heads, group * width, hidden]
            into = self.projections[layer].double().T.reshape(*moments.shape[:2], -1)
            found.append(torch.einsum("hij,hik,hjk->h", moments, into, into))
        return torch.stack(found).float()
