"""Parse ``K=V`` options and lists of numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from typing import TypeVar

from memlong.errors import InvalidArgumentError

Number = TypeVar("Number", int, float)


def key_values(
    option: str, given: Iterable[str], *, example: str = "index=HNSW32", as_text: Container[str] = ()
) -> dict[str, object]:
    """Parse ``K=V`` strings into a dictionary; values are parsed as JSON where possible, and stay text otherwise.

    Parameters
    ----------
    option
        The option's name, for error messages.
    given
        The strings given on the command line.
    example
        A valid value, for error messages.
    as_text
        Keys whose values always stay text.

    Raises
    ------
    InvalidArgumentError
        If a string has no ``=``, or a key is given twice.
    """
    found: dict[str, object] = {}
    for text in given:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise InvalidArgumentError(f"{option} must be K=V, such as {option} {example}, got {text!r}")
        if key in found:
            raise InvalidArgumentError(f"{option} must give each key once, got {key!r} twice")
        found[key] = value
        if key not in as_text:
            with suppress(ValueError, RecursionError):  # too many digits, or too deeply nested
                found[key] = json.loads(value)
    return found


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
