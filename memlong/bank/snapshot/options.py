"""What a stranger's file may choose of a class: the options that its author says do no harm, within bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memlong.errors import HIDDEN, InvalidArgumentError

SavedOptions = Mapping[str, float | None]
"""By name of an option, its maximum; None for text and for numbers without a limit.

It may name no network address, no credential, no place to write to and no code: those the user gives.
"""

OF_EVERY_BANK: SavedOptions = {
    "metric": None,
    "max_chunks": None,
    "max_bytes": None,
    "eviction": None,
    "device": None,
}
"""Those of every bank that a file may choose."""


def refused_option(cls: type, options: Mapping[str, Any], allowed: SavedOptions) -> str:
    """Say which option a file may not choose of a class, why and what to do; nothing if it may choose all of them."""
    for name, value in options.items():
        if name not in allowed:
            why = f"which {cls.__name__} takes from no file"
        elif not isinstance(value, str | int | float | bool | None):
            why = f"of type {type(value).__name__}, and no text or number"
        elif _exceeds(value, allowed[name]):
            why = f"{value!r}, more than a file may ask for ({allowed[name]:,})"
        else:
            continue
        return (
            f"names the option {name!r}, {why}: a file may be a stranger's. If it is right, give {name} yourself when "
            "loading"
        )
    return ""


def options_to_save(options: Mapping[str, Any], allowed: SavedOptions) -> dict[str, Any]:
    """Return a backend's own options for a file; text that its author has not named as harmless may be secret.

    Raises
    ------
    InvalidArgumentError
        If a file cannot hold one.
    """
    for name, value in options.items():
        if not isinstance(value, str | int | float | bool | None):
            raise InvalidArgumentError(
                f"the option {name} is {value!r}, which a snapshot cannot hold: make the bank with text, numbers, "
                "True, False or None"
            )
    return {
        name: HIDDEN if isinstance(value, str) and name not in allowed else value
        for name, value in options.items()
    }


def _exceeds(value: object, most: float | None) -> bool:
    return most is not None and isinstance(value, int | float) and not value <= most
