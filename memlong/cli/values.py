"""Read what users type: ``K=V`` options and numbers."""

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
    """Turn ``K=V`` texts into a dictionary; numbers, true, false and null become such, all else stays text.

    Parameters
    ----------
    option
        Its name, for messages.
    given
        What the user wrote.
    example
        A good value, for messages.
    as_text
        Keys whose values are text, whatever they look like.

    Raises
    ------
    InvalidArgumentError
        If a text has no ``=``, or a key comes twice.
    """
    found: dict[str, object] = {}
    for text in given:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise InvalidArgumentError(
                f"{option} {text!r} is not of the form K=V, such as {option} {example}"
            )
        if key in found:
            raise InvalidArgumentError(f"{option} gives {key!r} twice; give it once")
        found[key] = value
        if key not in as_text:
            with suppress(
                ValueError, RecursionError
            ):  # of a number with too many digits, or too many brackets
                found[key] = json.loads(value)
    return found


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Turn ``1,2,3`` into numbers.

    Raises
    ------
    InvalidArgumentError
        If a part is not a number, or there is none.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidArgumentError(
            f"{option} is {text!r}; expected numbers separated by commas, such as {option} 1,2"
        ) from error
