"""Gates: a trainable bias of each head on its logits of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from memlong.decoder.config import MemoryConfig
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.persistence.tensor_file import check_floating, making, read_tensors, write_tensors
from memlong.errors import InvalidArgumentError

_FORMAT = "memlong-gates-1"


class MemoryGates(nn.Module):
    """What each head of each retrieval layer adds to its logits of memory, before the softmax.

    A gate of 0 changes nothing; -8 leaves a memory token a three-thousandth of its weight. The lower the gates, the
    closer an untrained start is to the plain model.

    Parameters
    ----------
    layers
        The retrieval layers, ascending.
    bias
        [layers, heads].
    """

    def __init__(self, layers: tuple[int, ...], bias: Tensor) -> None:
        super().__init__()
        if bias.ndim != 2 or bias.shape[0] != len(layers):
            raise InvalidArgumentError(
                f"bias must be [layers, heads] for {len(layers)} layers, got {tuple(bias.shape)}"
            )
        self.layers = layers
        self.bias = nn.Parameter(bias)

    def of(self, layer: int) -> Tensor:
        """Return the gates [heads] of a retrieval layer."""
        return self.bias[self.layers.index(layer)]

    def save(self, path: str | Path) -> None:
        """Write the gates as one safetensors file."""
        write_tensors(path, _FORMAT, self.layers, {"bias": self.bias})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises
        ------
        InvalidArgumentError
            If the file is missing or holds something else.
        """
        layers, tensors = read_tensors(path, _FORMAT, field="gates", command="memlong train")
        with making(path, "gates", field="gates", command="memlong train"):
            check_floating(tensors["bias"])
            return cls(layers, tensors["bias"])


def make_gates(
    config: MemoryConfig, model_layout: ModelLayout, retrieval_layers: tuple[int, ...], like: Tensor
) -> MemoryGates | None:
    """Make the gates that the configuration asks for, float32, on the device of ``like``.

    Raises
    ------
    InvalidArgumentError
        If the gates' file cannot be read, or was made for other layers or heads, or layers differ in their heads.
    """
    if config.gates is None and config.gate_init is None:
        return None
    counts = {model_layout.layers[layer].heads for layer in retrieval_layers}
    if len(counts) > 1:
        raise InvalidArgumentError(
            f"Retrieval layers with gates must have the same number of heads, got {sorted(counts)}. Leave gate_init "
            "and gates out, or set retrieval_layers to those that are alike"
        )
    heads = counts.pop()
    if config.gates is None:
        assert config.gate_init is not None  # noqa: S101 - one of both is set
        shape = (len(retrieval_layers), heads)
        bias = torch.full(shape, float(config.gate_init), dtype=torch.float32, device=like.device)
        return MemoryGates(retrieval_layers, bias)
    gates = MemoryGates.load(config.gates)
    theirs, ours = (gates.layers, gates.bias.shape[1]), (retrieval_layers, heads)
    if theirs != ours:
        raise InvalidArgumentError(
            f"gates names {config.gates!r}, made for the layers {theirs[0]} with {theirs[1]} heads, but memory is in "
            f"the layers {ours[0]} with {ours[1]}. Set retrieval_layers and retrieval_heads to those of the gates"
        )
    return gates.to(device=like.device, dtype=torch.float32)
