"""How names are compared and what to suggest for one that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def normalise(name: str) -> str:
    """Return ``name`` as packages are compared: lower case, with ``_`` for ``-`` and ``.``."""
    return name.strip().lower().replace("-", "_").replace(".", "_")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known name, or nothing where none is close."""
    candidates = sorted(set(known))
    if closest := difflib.get_close_matches(name, candidates, n=1):
        return f" Did you mean {closest[0]!r}?"
    wanted = normalise(name)
    if wanted and (holding := [known_name for known_name in candidates if wanted in normalise(known_name)]):
        return f" Did you mean {holding[0]!r}?"
    return ""


def quoted(names: Iterable[str]) -> str:
    """Return the names in quotes, separated by commas, or ``none``."""
    return ", ".join(repr(name) for name in names) or "none"
