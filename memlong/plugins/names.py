"""Compare names, suggest a close one for an unknown name, and shorten untrusted text for messages."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterable
from itertools import islice

_MOST_NAMES, _MOST_COMPARED, _MOST_SAID, _MOST_KIND = 40, 5_000, 2_000, 100
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 100


def normalize(name: str) -> str:
    """Normalize a name as for packages: lowercase, with ``_`` for ``-`` and ``.``."""
    return name.strip().lower().replace("-", "_").replace(".", "_")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``". Did you mean 'x'?"`` with the closest known name, or an empty string if none is close."""
    candidates = sorted(set(known))[:_MOST_COMPARED]
    if closest := difflib.get_close_matches(name, candidates, n=1):
        return f". Did you mean {closest[0]!r}?"
    wanted = normalize(name)
    if wanted and (holding := [known_name for known_name in candidates if wanted in normalize(known_name)]):
        return f". Did you mean {holding[0]!r}?"
    return ""


def quoted(names: Collection[str]) -> str:
    """Return the names quoted and comma-separated, up to a maximum number, or ``none``."""
    shown = ", ".join(repr(name) for name in islice(names, _MOST_NAMES)) or "none"
    return shown if len(names) <= _MOST_NAMES else f"{shown} and {len(names) - _MOST_NAMES:,} more"


def brief(value: object) -> str:
    """Return a shortened repr of any value, or a placeholder if it has none."""
    try:
        return _BRIEF.repr(value)
    except ValueError:  # an int with more digits than Python prints
        return f"a huge {type(value).__name__}"


def cut(text: str, most: int) -> str:
    """Truncate untrusted text to a number of characters."""
    return text if len(text) <= most else f"{text[:most]}… and {len(text) - most:,} more characters"


def text_of(error: BaseException) -> str:
    """Return the text of any exception, or why it cannot be printed."""
    try:
        return str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as failure:  # noqa: BLE001 - a plugin's __str__ may raise anything
        return f"(it cannot be printed: its text raises {cut(type(failure).__name__, _MOST_KIND)})"


def explained(error: BaseException) -> str:
    """Return the type and the truncated text of any exception."""
    kind, said = cut(type(error).__name__, _MOST_KIND), text_of(error)
    return f"{kind}: {cut(said, _MOST_SAID)}" if said else kind
