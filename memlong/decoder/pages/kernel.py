"""Choice of pages for few queries, and attention to them, on a CPU; compiled by numba, imported when first needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Kernel = Callable[[Floats, Floats, Floats, NDArray[np.int64], Floats, Floats], None]
"""Lets the query heads of one K-V head attend to each query's own pages.

Takes query [queries, group, width], scaled; key and value [tokens, width]; pages [queries, chosen]; and, to be
overwritten, output [queries, group, width] and logsumexp [queries, group].
"""


Chooser = Callable[[Floats, NDArray[np.int8], Floats, NDArray[np.int64]], None]
"""Chooses pages for the query heads of one K-V head.

Takes query [queries, group, kept], scaled; keys [chunks, kept, tokens] and scales [chunks, kept] of a sketch; and, to
be overwritten, pages [queries, chosen].
"""
# All of fast math, but for the promise that nothing is NaN or infinite.
_ORDER_IS_FREE = {"reassoc", "contract", "nsz", "arcp", "afn"}
_Function = TypeVar("_Function", Kernel, Chooser)


def _compiled(function: _Function) -> _Function:
    """Compile a function, once for all processes where there is a folder to keep it in."""
    compiled = partial(njit, nogil=True, fastmath=_ORDER_IS_FREE, error_model="numpy")
    try:
        kernel: _Function = compiled(cache=True)(function)
    except RuntimeError:  # no folder can be written
        kernel = compiled()(function)
    return kernel


@cache
def chooser_of(group: int, kept: int, page_size: int, pages: int) -> Chooser:
    """Return the chooser for these sizes, with so many pages of a chunk."""
    tokens = page_size * pages

    @_compiled
    def choose(query: Floats, keys: NDArray[np.int8], scales: Floats, chosen: NDArray[np.int64]) -> None:
        queries, count = chosen.shape
        chunks = keys.shape[0]
        best = np.empty((group, chunks * pages), np.float32)
        products, channels = np.empty((group, tokens), np.float32), np.empty(tokens, np.float32)
        shares = np.empty(chunks * pages, np.float32)
        for number in range(queries):
            for chunk in range(chunks):
                products[:] = 0
                for channel in range(kept):
                    these = keys[chunk, channel]
                    for token in range(tokens):
                        channels[token] = these[token]
                    for head in range(group):
                        asked, mine = query[number, head, channel] * scales[chunk, channel], products[head]
                        for token in range(tokens):
                            mine[token] += asked * channels[token]
                for head in range(group):
                    mine, logits = products[head], best[head, chunk * pages : (chunk + 1) * pages]
                    logits[:] = mine[:pages]
                    for token in range(1, page_size):
                        for page in range(pages):
                            logits[page] = max(logits[page], mine[token * pages + page])
            shares[:] = 0
            for head in range(group):
                logits = best[head]
                largest, total = logits[0], np.float32(0)
                for page in range(1, chunks * pages):
                    largest = max(largest, logits[page])
                for page in range(chunks * pages):
                    logits[page] = np.exp(logits[page] - largest)
                    total += logits[page]
                for page in range(chunks * pages):
                    shares[page] += logits[page] / total
            least, found = np.partition(shares, chunks * pages - count)[chunks * pages - count], 0
            for page in range(chunks * pages):
                if shares[page] > least and found < count:
                    chosen[number, found] = page
                    found += 1
            for page in range(chunks * pages):
                if shares[page] == least and found < count:
                    chosen[number, found] = page
                    found += 1
            for place in range(found, count):  # of a query that is not a number
                chosen[number, place] = place

    return choose


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
