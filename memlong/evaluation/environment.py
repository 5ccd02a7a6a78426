"""What a result was measured on."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

_PACKAGES = (
    "memlong",
    "torch",
    "transformers",
    "numpy",
    "faiss-cpu",
    "faiss-gpu",
    "hnswlib",
    "sentence-transformers",
)


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far, in bytes; None on Windows, where Python cannot tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, those that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
