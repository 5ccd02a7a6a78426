"""Sizes in bytes as people write them."""

from __future__ import annotations

import operator
import re

import numpy as np

from memlong.errors import InvalidArgumentError

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for ending, base in (("", 1000), ("b", 1000), ("ib", 1024))
}

_DIGITS = 20


def byte_count(name: str, size: int | str, *, at_least: int = 0) -> int:
    """Return a size in bytes: an int of at least so many, or text such as "500MB" or "2GiB".

    Raises
    ------
    InvalidArgumentError
        If it is neither.
    """
    count = _count(size)
    if count is None or count < at_least:
        least = ", at least 1" if at_least else ""
        raise InvalidArgumentError(
            f"{name} is {size!r}; expected bytes{least}, such as 2000000, '500MB' or '2GiB'"
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
