"""Layers by number, and their heads, as users write them."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from memlong.errors import InvalidArgumentError

_MOST_LAYERS = 10_000
_LONGEST = 20  # digits of the two ends of a range
_HEADS = re.compile(r"([0-9]{1,9}):([0-9]{1,9}(?:\+[0-9]{1,9})*)")


def heads_by_layer(text: str) -> dict[int, set[int]]:
    """Turn ``"15:0+2,16:1"`` into K-V heads by layer, of whatever model.

    Raises
    ------
    InvalidArgumentError
        If the text is malformed.
    """
    named: dict[int, set[int]] = {}
    for part in text.split(","):
        found = _HEADS.fullmatch(part.strip())
        if found is None:
            raise InvalidArgumentError(
                "retrieval_heads must be 'all', or K-V heads by layer such as '15:0+2,16:1', as `memlong heads` prints "
                f"them, got {text!r:.200}, where {part.strip()!r:.80} is not one"
            )
        named.setdefault(int(found[1]), set()).update(map(int, found[2].split("+")))
    return named


def parse_layers(text: str, eligible: tuple[int, ...], layers: Collection[int]) -> tuple[int, ...]:
    """Turn ``"all"``, ``"15-29"`` or ``"3,7,11-13"`` into ascending layer numbers.

    Parameters
    ----------
    text
        What the user wrote.
    eligible
        What ``"all"`` means: the layers that can use a memory best.
    layers
        The layers that attend; of a range, these are meant.

    Raises
    ------
    InvalidArgumentError
        If the text is malformed or names a layer that does not attend, or that the model does not have.
    """
    if text.strip() == "all":
        return eligible
    named: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InvalidArgumentError(
                "retrieval_layers must be 'all', or layers and ranges such as '15-29' or '3,7,11-13', got "
                f"{text!r}, where {part.strip()!r} is neither a layer nor a range"
            )
        some = range(int(first), int(last or first) + 1) if len(f"{first}{last}") < _LONGEST else range(0)
        within = [layer for layer in layers if layer in some]
        if not within or (some[-1] > max(layers)) or (not dash and len(within) < len(some)):
            raise InvalidArgumentError(
                f"retrieval_layers must be among {ranges(tuple(layers))}, the layers of this model that attend to K-V "
                f"of their own, and ranges must ascend, got {text!r}"
            )
        named.update(within)
    return tuple(sorted(named))


def ranges(layers: tuple[int, ...]) -> str:
    """Write layer numbers as `parse_layers` reads them, such as ``"0-3,7"``."""
    found: list[list[int]] = []
    for layer in sorted(set(layers)):
        if found and found[-1][-1] == layer - 1:
            found[-1].append(layer)
        else:
            found.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)


def layers_as_text(layers: object) -> object:
    """Write a list of layer numbers as text; leave what is none to the checks that follow."""
    if isinstance(layers, str):
        return layers
    given: Any = layers
    try:
        some = [given] if isinstance(given, int) or not hasattr(given, "__len__") else given
        if isinstance(given, bool) or not 0 < len(some) <= _MOST_LAYERS:
            return layers
        numbers = [operator.index(each) for each in some]  # of NumPy and torch, too
    except TypeError:
        return layers
    return ranges(tuple(numbers)) if min(numbers) >= 0 else layers


def heads_as_text(heads: Mapping[int, Sequence[int]]) -> str:
    """Write K-V heads by layer as `parse_heads` reads them, such as ``"15:0+2,16:1"``."""
    return ",".join(f"{layer}:{'+'.join(map(str, some))}" for layer, some in sorted(heads.items()) if some)
