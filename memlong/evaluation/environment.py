"""What a result was measured on."""

from __future__ import annotations

import sys


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far, in bytes; None on Windows, where Python cannot tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
