"""What fitting to text shares: checked passages, and a slot for attention that records output projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlong.decoder.model.attention import AttentionSlot, evaluating, installed, replaced_attention
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.model.weights import true_tensor
from memlong.decoder.stream.tokens import token_lists
from memlong.errors import InvalidArgumentError, UnsupportedModelError


def check_passages(passages: Sequence[Tensor], layout: ModelLayout) -> None:
    """Refuse passages that are not token ids [1, tokens] of the model.

    Raises
    ------
    InvalidArgumentError
        If one is not, or there are none.
    """
    if not isinstance(passages, Sequence) or not passages:
        raise InvalidArgumentError(
            f"passages must be a list of tensors of token ids [1, tokens], got {passages!r:.80}"
        )
    for passage in passages:
        if not isinstance(passage, Tensor) or passage.ndim != 2 or len(passage) != 1 or not passage.numel():
            got = f"shape {tuple(passage.shape)}" if isinstance(passage, Tensor) else type(passage).__name__
            raise InvalidArgumentError(
                f"passages must be a list of tensors of token ids [1, tokens], one per passage, got {got}"
            )
        token_lists(passage, None, layout)


@dataclass(eq=False)
class ProjectionWatch(AttentionSlot):
    """Watches some layers while a model reads; subclasses say what is recorded of attention.

    Parameters
    ----------
    layout
        The model's layers.
    layers
        Those to watch.

    Attributes
    ----------
    projections
        By layer, the weight that attention's output goes through [hidden, heads * width], float32 on the CPU.
    """

    layout: ModelLayout
    layers: tuple[int, ...]
    projections: dict[int, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        super().__init__()

    @torch.no_grad()
    def run(self, model: PreTrainedModel, passage: Tensor, **options: Any) -> Any:
        """Run the model on a passage [1, tokens] on its device, and return its output.

        Raises
        ------
        UnsupportedModelError
            If memory does not attach to the model, or its attention has no linear output projection.
        """
        names = {part: name for name, part in model.named_modules()}
        hooks = [
            part.register_forward_hook(self._note(layer, model, f"{names[part]}.weight"))
            for layer in self.layers
            for part in self.layout.layers[layer].module.modules()
            if isinstance(part, nn.Linear)
        ]
        try:
            with evaluating(model), installed(self, self.layout.modules), replaced_attention(model):
                output = model(input_ids=passage, use_cache=False, logits_to_keep=1, **options)
        finally:
            for hook in hooks:
                hook.remove()
        missing = [layer for layer in self.layers if layer not in self.projections]
        if missing:
            raise UnsupportedModelError(
                "Latent maps and scores of heads need a linear output projection after attention, but "
                f"{type(model).__name__} has none in layers {missing}"
            )
        return output

    def _note(self, layer: int, model: PreTrainedModel, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """Return a hook that records weights; in attention modules, the output projection is the last linear layer."""

        def note(part: nn.Module, _inputs: Any, _output: Any) -> None:
            weight: Tensor = true_tensor(model, name, part.weight)
            self.projections[layer] = weight.detach().float().cpu()

        return note
