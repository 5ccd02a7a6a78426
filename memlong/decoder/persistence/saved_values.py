"""Values of a saved state, checked one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def fact_of(facts: Mapping[str, Any], name: str, *kinds: type) -> Any:
    """Return a fact of exactly one of these types (a bool is not an int); ValueError for others."""
    found = facts[name]
    if type(found) not in kinds:
        raise ValueError(f"{name} must be {' or '.join(kind.__name__ for kind in kinds)}, got {found!r}")
    return found


def tensor_of(
    tensors: Mapping[str, Tensor], name: str, *shape: int | None, like: Tensor | None = None
) -> Tensor:
    """Return a tensor of a shape (None is any size), on the device and in the dtype of ``like``, else int64.

    Raises
    ------
    ValueError
        If its shape or dtype is another.
    """
    dtype = torch.int64 if like is None else like.dtype
    found = tensors[name]
    fits = found.ndim == len(shape) and all(
        want in (None, have) for have, want in zip(found.shape, shape, strict=True)
    )
    if not fits or found.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}{list(shape)}, got {found.dtype}{list(found.shape)}")
    return found if like is None else found.to(like.device)
