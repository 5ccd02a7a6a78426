"""Checks of what callers pass to a bank; each error names the argument, what it must be, and its value."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from memlong.bank.arrays import FloatInput, Floats, Ids, IntInput
from memlong.errors import InvalidArgumentError
from memlong.settings import repr_of

_LARGEST_NORM = 1e18
_LONGEST = 80  # of a value in a message
_SMALLEST_SQUARE = 1e-200  # next to a sum of squares above this, what underflows does not count


def whole_number(name: str, value: Any, *, at_least: int, at_most: int | None = None) -> int:
    """Return the value of an option as an int; floats, bools and text are not whole numbers.

    Parameters
    ----------
    name : str
        What the option is called.
    value
        What was given for it.
    at_least, at_most : int
        The bounds, both included.

    Raises
    ------
    InvalidArgumentError
        If it is not such a number; the message names the option, the value and the bounds.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, (bool, np.bool_)) or number < at_least:
        raise InvalidArgumentError(f"{name} must be an integer of at least {at_least}, got {repr_of(value)}")
    if at_most is not None and number > at_most:
        raise InvalidArgumentError(
            f"{name} must be an integer from {at_least} to {at_most}, got {repr_of(value)}"
        )
    return number


def embeddings_of(name: str, value: FloatInput, dim: int, *, unit: bool) -> Floats:
    """Return a float32 [n, dim] copy of `value`, each row scaled to unit length if `unit`.

    Parameters
    ----------
    name : str
        What the caller calls it.
    value : torch.Tensor or numpy.ndarray
        [n, dim], any float dtype, device and strides.
    dim : int
        The width it must have.
    unit : bool
        Scale each row to length 1; a row of zeros stays as it is.

    Raises
    ------
    InvalidArgumentError
        If it is not a float matrix of that width, or holds a value that is not finite or too large to square.
    """
    wide = _float64(name, value)
    if wide.ndim != 2 or wide.shape[1] != dim:
        raise InvalidArgumentError(f"{name} must have shape [n, {dim}], got {list(wide.shape)}")
    if unit:
        return _unit(name, wide)
    largest = max(wide.max(initial=0.0), -wide.min(initial=0.0))
    if not largest * dim**0.5 <= _LARGEST_NORM:
        _check_finite(name, wide)
        raise InvalidArgumentError(
            f"{name} must hold vectors no longer than {_LARGEST_NORM:g}, whose products fit into float32, got a value "
            f"of size {largest:g}"
        )
    return wide.astype(np.float32)


def spans_of(value: IntInput, count: int) -> Ids:
    """Return an int64 [count, 2] copy of token spans, each start below its end."""
    spans = _int64("spans", value)
    if not count and not spans.size:
        return np.empty((0, 2), dtype=np.int64)
    if spans.shape != (count, 2):
        raise InvalidArgumentError(
            f"spans must have shape [{count}, 2], one [start, end) per embedding, got {list(spans.shape)}"
        )
    for row in np.flatnonzero((spans[:, 0] >= spans[:, 1]) | (spans[:, 0] < 0))[:1]:
        raise InvalidArgumentError(
            f"spans[{row}] must be [start, end) with 0 <= start < end, got [{spans[row, 0]}, {spans[row, 1]}]"
        )
    return spans


def ids_of(value: IntInput, name: str = "ids") -> Ids:
    """Return an int64 [n] copy of chunk ids."""
    ids = _int64(name, value)
    if ids.ndim != 1:
        raise InvalidArgumentError(f"{name} must have shape [n], got {list(ids.shape)}")
    return ids


def blocks_of(keys: FloatInput, values: FloatInput, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values as tensors of one shape, dtype and device, detached but not copied.

    Whether they are finite, `Finiteness` finds out: on a device, that takes time.

    Raises
    ------
    InvalidArgumentError
        If one is not a float array [count, layers, kv_heads, chunk, head_dim], or differs from the other in shape,
        dtype or device.
    """
    key, value = _blocks("keys", keys, count), _blocks("values", values, count)
    for what in ("shape", "dtype", "device"):
        ours, theirs = getattr(key, what), getattr(value, what)
        if ours != theirs:
            raise InvalidArgumentError(f"values must have the {what} of keys, {ours}, got {theirs}")
    return key, value


def _blocks(name: str, value: FloatInput, count: int) -> torch.Tensor:
    block = _float_tensor(name, value)
    if block.ndim != 5 or block.shape[0] != count:
        raise InvalidArgumentError(
            f"{name} must have shape [{count}, layers, kv_heads, chunk, head_dim], one block per embedding, "
            f"got {list(block.shape)}"
        )
    return block


def _unit(name: str, wide: npt.NDArray[np.float64]) -> Floats:
    """Scale rows to unit length, each by its own values alone; zeros stay."""
    squares = np.einsum("nd,nd->n", wide, wide)
    if not all(_SMALLEST_SQUARE < square < math.inf for square in squares.tolist()):
        _check_finite(name, wide)
        odd = (squares <= _SMALLEST_SQUARE) | (squares == np.inf)
        largest = np.abs(wide[odd]).max(axis=1, keepdims=True, initial=0.0)
        wide[odd] /= np.where(largest > 0, largest, 1.0)
        squares[odd] = np.einsum("nd,nd->n", wide[odd], wide[odd])
        squares[squares == 0] = 1.0
    vectors: Floats = np.empty(wide.shape, dtype=np.float32)
    np.divide(wide, np.sqrt(squares)[:, None], out=vectors, casting="same_kind")
    return vectors


def _check_finite(name: str, wide: npt.NDArray[np.float64]) -> None:
    for row, column in np.argwhere(~np.isfinite(wide))[:1]:
        raise InvalidArgumentError(f"{name} must be finite, got {wide[row, column]} at [{row}, {column}]")


def _float_tensor(name: str, value: FloatInput) -> torch.Tensor:
    if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating):
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        raise InvalidArgumentError(
            f"{name} must be a torch tensor or NumPy array of a float dtype, got {_describe(value)}"
        )
    return value.detach()


def _float64(name: str, value: FloatInput) -> npt.NDArray[np.float64]:
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return np.array(value, dtype=np.float64, order="C")
    return _float_tensor(name, value).to("cpu", torch.float64, copy=True).contiguous().numpy()


def _int64(name: str, value: IntInput) -> Ids:
    array = np.asarray(value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise InvalidArgumentError(f"{name} must hold integers, got {_describe(value)}")
    return np.array(array, dtype=np.int64)


def _describe(value: object) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{type(value).__name__} of {value.dtype}"
    shown = repr(value)
    return f"{shown if len(shown) <= _LONGEST else f'{shown[:_LONGEST]}...'} of type {type(value).__name__}"
