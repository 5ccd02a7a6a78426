"""Sizes in bytes as people write them."""

from __future__ import annotations

import operator
import re

import numpy as np

from memlong.errors import InvalidArgumentError
from memlong.settings import repr_of

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for ending, base in (("", 1000), ("b", 1000), ("ib", 1024))
}

_DIGITS = 20


def byte_count(name: str, size: int | str, *, at_least: int = 0, at_most: int | None = None) -> int:
    """Return a size in bytes: an int within the bounds, or text such as "500MB" or "2GiB".

    Raises
    ------
    InvalidArgumentError
        If it is neither.
    """
    count = _count(size)
    if count is None or count < at_least or (at_most is not None and count > at_most):
        most = (
            f" and at most {at_most}" if at_most is not None and count is not None and count > at_most else ""
        )
        raise InvalidArgumentError(
            f"{name} must be a size in bytes of at least {at_least}{most}, such as 2000000, '500MB' or '2GiB', got "
            f"{repr_of(size)}"
        )
    return count


def _count(size: object) -> int | None:
    if not isinstance(size, str):
        try:
            return None if isinstance(size, (bool, np.bool_)) else operator.index(size)  # type: ignore[arg-type]
        except TypeError:
            return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", size.strip().lower())
    if match is None or match[2] not in _UNITS or len(match[1]) > _DIGITS:
        return None
    return int(float(match[1]) * _UNITS[match[2]])
