"""Versions of the packages that results, snapshots and trained decoders depend on, to be recorded with them."""

from __future__ import annotations

import importlib.metadata
import platform
from contextlib import suppress
from functools import cache

_PACKAGES = (
    "memlong",
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "peft",
    "faiss-cpu",
    "faiss-gpu",
    "hnswlib",
    "sentence-transformers",
)


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
