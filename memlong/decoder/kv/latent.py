"""Latent maps: one vector per token stands for the K-V of all retrieval layers.

Keys and values of a token are highly correlated across layers. A low-dimensional linear map keeps most of their effect:
the vector is stored, and each layer's own map turns it into that layer's keys and values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from memlong.decoder.persistence.tensor_file import check_floating, making, read_tensors, write_tensors
from memlong.errors import InvalidArgumentError

_FORMAT = "memlong-latent-maps-2"
_NAMES = ("encode", "decode")
_STEPS = 127  # of int8, on either side of 0


class LatentMaps(nn.Module):
    """The maps between the K-V of some layers and one vector per token.

    Parameters
    ----------
    layers
        The retrieval layers, ascending.
    mean
        [2, layers, kv_heads, head_dim]: mean keys (un-rotated) and mean values.
    encode
        [2, layers, kv_heads, head_dim, latent]: from deviations to the latent vector.
    decode
        Like ``encode``: from the latent vector to deviations.
    """

    mean: Tensor
    encode: Tensor

    def __init__(self, layers: tuple[int, ...], mean: Tensor, encode: Tensor, decode: Tensor) -> None:
        super().__init__()
        if mean.ndim != 4 or mean.shape[:2] != (2, len(layers)) or encode.shape[:-1] != mean.shape:
            raise InvalidArgumentError(
                "mean must be [2, layers, kv_heads, head_dim], and encode the same with a last dimension for the "
                f"latent vector, for {len(layers)} layers, got {tuple(mean.shape)} and {tuple(encode.shape)}"
            )
        if decode.shape != encode.shape or encode.shape[-1] % 2 or not encode.shape[-1]:
            raise InvalidArgumentError(
                "encode and decode must have equal shapes with an even last dimension of at least 2 (half of a vector "
                f"is stored as keys, half as values), got {tuple(encode.shape)} and {tuple(decode.shape)}"
            )
        self.layers = layers
        self.register_buffer("mean", mean)
        self.encode = nn.Parameter(encode, requires_grad=False)  # until training sets it
        self.decode = nn.Parameter(decode)

    @property
    def dim(self) -> int:
        """Numbers in a latent vector."""
        return self.encode.shape[-1]

    def to_latent(self, keys: Tensor, values: Tensor) -> Tensor:
        """Return latent vectors [tokens, dim] of un-rotated keys, and values, [layers, kv_heads, tokens, head_dim]."""
        # [2, layers, kv_heads, tokens, head_dim]
        states = torch.stack([keys, values]) - self.mean[:, :, :, None]
        encode: Tensor = self.encode
        # [tokens, 2 * layers * kv_heads * head_dim] @ [2 * layers * kv_heads * head_dim, dim]
        return states.permute(3, 0, 1, 2, 4).flatten(1) @ encode.flatten(0, 3).to(states.dtype)

    def from_latent(self, latent: Tensor, layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return un-rotated keys, and values, [layers, kv_heads, tokens, head_dim], for vectors [tokens, dim]."""
        mean: Tensor = self.mean
        decode: Tensor = self.decode
        if layers != self.layers:
            places = [self.layers.index(layer) for layer in layers]
            mean, decode = (
                torch.stack([each[:, place] for place in places], dim=1) for each in (mean, decode)
            )
        decode = decode.flatten(0, 3).to(latent.dtype)  # training keeps it in float32
        states = (latent @ decode.T).view(-1, *mean.shape) + mean  # [tokens, 2, layers, kv_heads, head_dim]
        keys, values = states.permute(1, 2, 3, 0, 4)  # [2, layers, kv_heads, tokens, head_dim]
        return keys, values

    def round_to_saved(self) -> None:
        """Round the maps to what `save` writes."""
        for name in _NAMES:
            tensor = getattr(self, name).detach()
            steps, scale = _quantized(tensor.float())
            tensor.copy_(steps * scale)

    def save(self, path: str | Path, *, compact: bool = True) -> None:
        """Write the maps as one safetensors file.

        Parameters
        ----------
        path
            The file.
        compact
            Write int8 with a scale for each channel of K-V, a quarter of the bytes; otherwise float32.

        Raises
        ------
        OSError, SafetensorError
            If it cannot be written.
        """
        tensors = {"mean": self.mean.float()}
        for name in _NAMES:
            exact = getattr(self, name).detach().float()
            if compact:
                tensors[name], tensors[f"{name}_scale"] = _quantized(exact)
            else:
                tensors[name] = exact
        write_tensors(path, _FORMAT, self.layers, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote, float32.

        Raises
        ------
        InvalidArgumentError
            If the file is missing or holds something else.
        """
        layers, tensors = read_tensors(path, _FORMAT, field="maps", command="memlong fit")
        with making(path, "maps", field="maps", command="memlong fit"):
            mean, both = tensors["mean"], [tensors[name] for name in _NAMES]
            if both[0].dtype == torch.int8:
                scales = [tensors[f"{name}_scale"] for name in _NAMES]
                if any(of.shape != (*each.shape[:-1], 1) for of, each in zip(scales, both, strict=True)):
                    raise ValueError("its scales are not those of its steps")
                both = [each * of for of, each in zip(scales, both, strict=True)]
            check_floating(mean, *both)
            return cls(layers, mean, *both)


def _quantized(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 steps, and the step size of each channel of K-V, along the last dimension.

    Step sizes are powers of two, so that products are exact in bfloat16, too.
    """
    largest = tensor.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * _STEPS)
    scale = torch.exp2((largest / _STEPS).log2().ceil())
    return (tensor / scale).round().to(torch.int8), scale
