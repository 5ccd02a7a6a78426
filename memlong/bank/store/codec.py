"""How a chunk's keys and values become bytes: unchanged, or in fewer bits."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from memlong.bank.layout import ChunkLayout
from memlong.bank.store.copying import stack
from memlong.errors import InvalidArgumentError

StorageDtype = Literal["bfloat16", "float8", "int8"]

_EIGHT_BITS: dict[str, tuple[torch.dtype, float]] = {
    "float8": (torch.float8_e4m3fn, 448.0),
    "int8": (torch.int8, 127.0),
}
_MOST_HALF = torch.finfo(torch.float16).max
_CHUNK, _HEAD_DIM = -2, -1


class BlockCodec(ABC):
    """Encodes blocks of one layout as records of equal length, and decodes them.

    Parameters
    ----------
    layout : ChunkLayout
        Layout of the blocks.
    """

    def __init__(self, layout: ChunkLayout) -> None:
        self.layout = layout

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of a record."""

    @abstractmethod
    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Encode blocks [n, layers, kv_heads, chunk, head_dim] as records [n, nbytes], uint8."""

    @abstractmethod
    def decode(self, records: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of n >= 1 records as new tensors, in the layout's dtype, on the records' device."""


class PlainCodec(BlockCodec):
    """Keys and values in one dtype: their own, which is lossless, or a narrower one.

    Parameters
    ----------
    layout : ChunkLayout
        Layout of the blocks.
    dtype : torch.dtype, optional
        Dtype of the records; by default, that of the blocks.
    """

    def __init__(self, layout: ChunkLayout, dtype: torch.dtype | None = None) -> None:
        super().__init__(layout)
        self._dtype = dtype or layout.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of a record."""
        return 2 * math.prod(self.layout.shape) * self._dtype.itemsize

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Concatenate the bytes of keys and values."""
        return torch.cat([_bytes(keys.to(self._dtype)), _bytes(values.to(self._dtype))], dim=1)

    def decode(self, records: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy each half once, or twice if the dtype differs."""
        halves = zip(*(record.tensor_split(2) for record in records), strict=True)
        keys, values = (_as(stack(half), self._dtype, self.layout.shape) for half in halves)
        return keys.to(self.layout.dtype), values.to(self.layout.dtype)


class ScaledCodec(BlockCodec):
    """Eight-bit quantization with float16 scales, per channel for keys and per token for values.

    Outliers of keys are in a few channels and those of values in a few tokens (KIVI, arXiv 2402.02750, section 3).

    Parameters
    ----------
    layout : ChunkLayout
        Layout of the blocks.
    dtype : "float8" or "int8"
        The eight-bit dtype; float8 is e4m3.
    """

    def __init__(self, layout: ChunkLayout, dtype: Literal["float8", "int8"]) -> None:
        super().__init__(layout)
        self._dtype, self._limit = _EIGHT_BITS[dtype]
        layers, heads, chunk, width = layout.shape
        self._key_scales, self._value_scales = (layers, heads, 1, width), (layers, heads, chunk, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of a record."""
        scales = math.prod(self._key_scales) + math.prod(self._value_scales)
        return 2 * math.prod(self.layout.shape) + 2 * scales

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Scale and round, and concatenate scales and numbers."""
        parts = []
        for states, axis in ((keys, _CHUNK), (values, _HEAD_DIM)):
            wide = states.float()
            largest = wide.abs().amax(dim=axis, keepdim=True)
            # Never zero, subnormal or infinite in float16.
            scale = (largest / self._limit).clamp_(2.0**-14, _MOST_HALF).half()
            scaled = (wide / scale.float()).clamp_(-self._limit, self._limit)
            if self._dtype == torch.int8:
                scaled.round_()
            parts += [_bytes(scale), _bytes(scaled.to(self._dtype))]
        return torch.cat(parts, dim=1)

    def decode(self, records: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale back."""
        count = math.prod(self.layout.shape)
        sizes = [2 * math.prod(self._key_scales), count, 2 * math.prod(self._value_scales), count]
        key_scales, keys, value_scales, values = stack(records).split(sizes, dim=1)
        return (
            self._scaled(keys, key_scales, self._key_scales),
            self._scaled(values, value_scales, self._value_scales),
        )

    def _scaled(self, numbers: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        wide = _as(numbers, self._dtype, self.layout.shape).float()
        aligned = scales.clone()  # within a record, they may start at an odd byte
        return wide.mul_(_as(aligned, torch.float16, shape).float()).to(self.layout.dtype)


def make_codec(layout: ChunkLayout, dtype: StorageDtype | None) -> BlockCodec:
    """Return the codec that stores blocks of this layout in ``dtype``; None keeps their own."""
    check_storage_dtype(dtype)
    if dtype == "float8" or dtype == "int8":
        return ScaledCodec(layout, dtype)
    return PlainCodec(layout, torch.bfloat16 if dtype == "bfloat16" else None)


def check_storage_dtype(dtype: object) -> None:
    """Raise InvalidArgumentError unless blocks can be stored in ``dtype``."""
    if dtype is not None and dtype not in get_args(StorageDtype):
        raise InvalidArgumentError(
            f"dtype must be one of {', '.join(get_args(StorageDtype))}, or None, got {dtype!r}"
        )


def _bytes(states: torch.Tensor) -> torch.Tensor:
    return states.detach().contiguous().view(torch.uint8).flatten(1)


def _as(records: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """[n, bytes] -> [n, *shape]."""
    return records.contiguous().view(dtype).view(len(records), *shape)
