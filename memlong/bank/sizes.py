"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

from memlong.errors import InvalidArgumentError

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for ending, base in (("", 1000), ("b", 1000), ("ib", 1024))
}

_DIGITS = 20


def byte_count(name: str, size: int | str) -> int:
    """Return a size in bytes: an int >= 0, or text such as "500MB" or "2GiB".

    Raises
    ------
    InvalidArgumentError
        If it is neither.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = (
        re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", size.strip().lower()) if isinstance(size, str) else None
    )
    if match is None or match[2] not in _UNITS or len(match[1]) > _DIGITS:
        raise InvalidArgumentError(f"{name} is {size!r}; expected bytes, such as 2000000, '500MB' or '2GiB'")
    return int(float(match[1]) * _UNITS[match[2]])
