"""Attention to chosen pages on a CPU, compiled by numba; imported when it is first needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Kernel = Callable[[Floats, Floats, Floats, NDArray[np.int64], Floats, Floats], None]
"""Lets the query heads of one K-V head attend to each query's own pages.

Takes query [queries, group, width], scaled; key and value [tokens, width]; pages [queries, chosen]; and, to be
overwritten, output [queries, group, width] and logsumexp [queries, group].
"""


def _compiled(function: Kernel) -> Kernel:
    """Compile a function, once for all processes where there is a folder to keep it in."""
    compiled = partial(njit, nogil=True, fastmath=True, error_model="numpy")
    try:
        kernel: Kernel = compiled(cache=True)(function)
    except RuntimeError:  # no folder can be written
        kernel = compiled()(function)
    return kernel


@cache
def kernel_of(width: int, group: int, page_size: int) -> Kernel:
    """Return the kernel for these sizes: where loops have known lengths, the compiler unrolls them."""

    @_compiled
    def attend(
        query: Floats,
        key: Floats,
        value: Floats,
        pages: NDArray[np.int64],
        output: Floats,
        logsumexp: Floats,
    ) -> None:
        queries, chosen = pages.shape
        weights = np.empty((group, chosen * page_size), np.float32)
        for number in range(queries):
            for place in range(chosen):
                first = pages[number, place] * page_size
                for token in range(page_size):
                    this = key[first + token]
                    for head in range(group):
                        asked, product = query[number, head], np.float32(0)
                        for channel in range(width):
                            product += asked[channel] * this[channel]
                        weights[head, place * page_size + token] = product
            for head in range(group):
                mine = weights[head]
                largest, total = mine[0], np.float32(0)
                for token in range(1, chosen * page_size):
                    largest = max(largest, mine[token])
                for token in range(chosen * page_size):
                    mine[token] = np.exp(mine[token] - largest)
                    total += mine[token]
                logsumexp[number, head] = largest + np.log(total)
                for token in range(chosen * page_size):
                    mine[token] /= total
                output[number, head] = 0
            for place in range(chosen):
                first = pages[number, place] * page_size
                these = value[first : first + page_size]
                for head in range(group):
                    mine = weights[head, place * page_size : (place + 1) * page_size]
                    result = output[number, head]
                    for channel in range(width):
                        mean = np.float32(0)
                        for token in range(page_size):
                            mean += mine[token] * these[token, channel]
                        result[channel] += mean

    return attend
