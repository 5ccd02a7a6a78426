"""Warnings that point to the line of the caller, however deep inside memlong they arise."""

from __future__ import annotations

import inspect
import warnings

_BETWEEN = frozenset({"memlong", "contextlib", "copy", "torch"})
"""Packages whose frames stand between a caller and the warning."""


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the first frame that is outside memlong and its backends."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and _is_between(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_between(module: str) -> bool:
    package = module.partition(".")[0]
    return package in _BETWEEN or package.startswith("memlong_")
