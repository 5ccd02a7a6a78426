"""Facts and tensors of a state that was saved, taken out one by one, each of the kind that it must have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def fact_of(facts: Mapping[str, Any], name: str, *kinds: type) -> Any:
    """Return a fact of one of these very types, no subclass of them, as bool is of int; ValueError if it is another."""
    found = facts[name]
    if type(found) not in kinds:
        raise ValueError(f"{name} is {found!r}, expected {' or '.join(kind.__name__ for kind in kinds)}")
    return found


def tensor_of(
    tensors: Mapping[str, Tensor], name: str, *shape: int | None, like: Tensor | None = None
) -> Tensor:
    """Return a tensor of a shape (None is any size), on the device and in the dtype of ``like``, else int64.

    Raises
    ------
    ValueError
        If there is none, or it is another.
    """
    dtype = torch.int64 if like is None else like.dtype
    found = tensors[name]
    fits = found.ndim == len(shape) and all(
        want in (None, have) for have, want in zip(found.shape, shape, strict=True)
    )
    if not fits or found.dtype != dtype:
        raise ValueError(f"{name} is {found.dtype}{list(found.shape)}, expected {dtype}{list(shape)}")
    return found if like is None else found.to(like.device)
