"""The environment of a measurement."""

from __future__ import annotations

import sys


def peak_rss_bytes() -> int | None:
    """Return the peak resident memory of this process, in bytes; None on Windows, where Python cannot report it."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
