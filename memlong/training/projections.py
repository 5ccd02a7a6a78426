"""A slot that also records the output projections of attention layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from memlong.decoder.model.attention import AttentionSlot
from memlong.decoder.model.layout import ModelLayout
from memlong.errors import UnsupportedModelError


@dataclass(eq=False)
class ProjectionWatch(AttentionSlot):
    """Records the weights that attention's output goes through while a model reads.

    Parameters
    ----------
    layout
        The model's layers.
    layers
        Those to watch.

    Attributes
    ----------
    projections
        By layer, the weight [hidden, heads * width], float32 on the CPU.
    """

    layout: ModelLayout
    layers: tuple[int, ...]
    projections: dict[int, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        super().__init__()

    @contextmanager
    def noting_projections(self) -> Iterator[None]:
        """Record projections; in attention modules, the last linear layer is the output projection."""
        with ExitStack() as hooks:
            for layer in self.layers:
                for part in self.layout.layers[layer].module.modules():
                    if isinstance(part, nn.Linear):
                        hooks.callback(part.register_forward_hook(self._note(layer)).remove)
            yield

    def _note(self, layer: int) -> Any:
        def note(part: nn.Module, _inputs: Any, _output: Any) -> None:
            self.projections[layer] = cast("Tensor", part.weight).detach().float().cpu()

        return note

    def check_projections(self, model: PreTrainedModel) -> None:
        """Refuse a model whose attention has no linear output projection."""
        missing = [layer for layer in self.layers if layer not in self.projections]
        if missing:
            raise UnsupportedModelError(
                f"Attention must end in a linear output projection, but {type(model).__name__} has none in layers "
                f"{missing}"
            )
