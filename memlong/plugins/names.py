"""How names are compared and told, what others wrote included, and what to suggest for one that is not known."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterable
from itertools import islice

_MOST_NAMES, _MOST_COMPARED, _MOST_SAID, _MOST_KIND = 40, 5_000, 2_000, 100
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 100


def normalise(name: str) -> str:
    """Return ``name`` as packages are compared: lower case, with ``_`` for ``-`` and ``.``."""
    return name.strip().lower().replace("-", "_").replace(".", "_")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known name, or nothing where none is close."""
    candidates = sorted(set(known))[:_MOST_COMPARED]
    if closest := difflib.get_close_matches(name, candidates, n=1):
        return f" Did you mean {closest[0]!r}?"
    wanted = normalise(name)
    if wanted and (holding := [known_name for known_name in candidates if wanted in normalise(known_name)]):
        return f" Did you mean {holding[0]!r}?"
    return ""


def quoted(names: Collection[str]) -> str:
    """Return the names in quotes, separated by commas, or ``none``; of very many, the first."""
    shown = ", ".join(repr(name) for name in islice(names, _MOST_NAMES)) or "none"
    return shown if len(names) <= _MOST_NAMES else f"{shown} and {len(names) - _MOST_NAMES:,} more"


def brief(value: object) -> str:
    """Return the repr of what somebody gave, cut if it is long, and something in its place if it has none."""
    return _BRIEF.repr(value)


def cut(text: str, most: int) -> str:
    """Return a text that somebody wrote, without what is beyond so many characters."""
    return text if len(text) <= most else f"{text[:most]}… and {len(text) - most:,} characters more"


def text_of(error: BaseException) -> str:
    """Return what an exception of others says, or why it cannot be printed."""
    try:
        return str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as failure:  # noqa: BLE001 - it is a plugin's, and may raise anything
        return f"(it cannot be printed: its text raises {cut(type(failure).__name__, _MOST_KIND)})"


def explained(error: BaseException) -> str:
    """Return the type of an exception of others, and what it says, unless that is a book."""
    kind, said = cut(type(error).__name__, _MOST_KIND), text_of(error)
    return f"{kind}: {cut(said, _MOST_SAID)}" if said else kind
