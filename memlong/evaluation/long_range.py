"""Long-range tokens, which a memory can help with: they last occurred beyond the local window."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def long_range_tokens(token_ids: Sequence[int], distance: int) -> NDArray[np.bool_]:
    """Mark the tokens whose previous occurrence is more than ``distance`` tokens back.

    Parameters
    ----------
    token_ids
        The whole text.
    distance
        In tokens; usually the local window.

    Returns
    -------
    ndarray
        [tokens], bool. First occurrences are not marked.
    """
    last: dict[int, int] = {}
    marked = np.zeros(len(token_ids), dtype=np.bool_)
    for index, token in enumerate(token_ids):
        before = last.get(token)
        marked[index] = before is not None and index - before > distance
        last[token] = index
    return marked
