"""Parse lists of numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from memlong.errors import InvalidArgumentError

Number = TypeVar("Number", int, float)


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Parse ``1,2,3`` into a list of numbers.

    Raises
    ------
    InvalidArgumentError
        If a part is not a number, or the list is empty.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidArgumentError(
            f"{option} must be comma-separated numbers, such as {option} 1,2, got {text!r}"
        ) from error
