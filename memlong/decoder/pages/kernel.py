"""Choice of pages for few queries, and attention to them, on a CPU; compiled by numba, imported when first needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numba.extending import register_jitable
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Kernel = Callable[[Floats, Floats, Floats, NDArray[np.int64], Floats, Floats], None]
"""Lets the query heads of one K-V head attend to each query's own pages.

Takes query [queries, group, width], scaled; key and value [tokens, width]; pages [queries, chosen]; and, to be
overwritten, output [queries, group, width] and logsumexp [queries, group].
"""


Joiner = Callable[..., None]
"""Lets few queries choose pages and attend to them, and joins that to what they have of the window.

Takes query [rows, heads, queries, width]; scale, the factor of the products; gates [heads], added to logits of memory;
heads, the K-V heads that attend to memory; slots, how many chunks there are; memory, which is keys, values [rows,
layers, memory heads, tokens, width], and of the sketch channels [rows, layers, memory heads, kept], keys [rows, layers,
memory heads, slots, kept, tokens of a chunk] and scales, without tokens; place, the index of the layer; chosen [rows,
memory heads, queries, pages], overwritten by what each query chooses; and, of the window, output [rows, queries, heads,
width], which becomes that of window and pages, and logsumexp [rows, heads, queries].
"""
# All of fast math, but for the promise that nothing is NaN or infinite.
_ORDER_IS_FREE = {"reassoc", "contract", "nsz", "arcp", "afn"}
_Function = TypeVar("_Function", Kernel, Joiner)


def _compiled(function: _Function) -> _Function:
    """Compile a function, once for all processes where there is a folder to keep it in."""
    compiled = partial(njit, nogil=True, fastmath=_ORDER_IS_FREE, error_model="numpy")
    try:
        kernel: _Function = compiled(cache=True)(function)
    except RuntimeError:  # no folder can be written
        kernel = compiled()(function)
    return kernel


# 2^x for |x| <= 1/2: the Chebyshev interpolation of degree 6, from the highest power down.
_P6, _P5, _P4 = (
    np.float32(1.5461444724808513e-4),
    np.float32(1.3400428177711937e-3),
    np.float32(9.61805667843204e-3),
)
_P3, _P2, _P1 = (
    np.float32(5.5503272266968953e-2),
    np.float32(2.4022650922289554e-1),
    np.float32(6.9314720670282871e-1),
)
_LOG2_E = np.float32(np.log2(np.e))


@register_jitable(inline="always")
def exponentiate(logits: Floats, bits: NDArray[np.int32]) -> tuple[np.floating[Any], np.floating[Any]]:
    """Overwrite logits by exp(logits - largest); return the largest, and the sum of what is there now.

    The compiler computes many at a time, which it does not with exp itself. Relative errors are below 1e-5 down to 87
    below the largest; what is lower, -inf too, is 2^-126. ``bits`` is space for as many.
    """
    count = len(logits)
    largest, total = logits[0], np.float32(0)
    for number in range(1, count):
        largest = max(largest, logits[number])
    for number in range(count):
        power = max((logits[number] - largest) * _LOG2_E, np.float32(-126))
        whole = np.floor(power + np.float32(0.5))
        rest = power - whole
        part = ((_P6 * rest + _P5) * rest + _P4) * rest + _P3
        logits[number] = ((part * rest + _P2) * rest + _P1) * rest + np.float32(1)
        bits[number] = (np.int32(whole) + np.int32(127)) << np.int32(23)  # the exponent of 2 ** whole
    factors = bits.view(np.float32)
    for number in range(count):
        logits[number] *= factors[number]
        total += logits[number]
    return largest, total


@register_jitable(inline="always")
def nth_largest(numbers: NDArray[np.int32], n: int) -> int:
    """Return the n-th largest of numbers, none of which is negative, by bisection."""
    low, high = -1, 2**31 - 1
    while high - low > 1:
        middle, more = (low + high) // 2, 0
        for number in numbers:
            more += number > np.int32(middle)
        if more >= n:
            low = middle
        else:
            high = middle
    return high


@register_jitable(inline="always")
def choose(
    query: Floats,
    keys: NDArray[np.int8],
    scales: Floats,
    chosen: NDArray[np.int64],
    group: int,
    kept: int,
    page_size: int,
    pages: int,
) -> None:
    """Choose pages for the query heads of one K-V head.

    Parameters
    ----------
    query
        [queries, group, kept], scaled.
    keys, scales
        Of a sketch [chunks, kept, tokens] and [chunks, kept]; token t of a chunk's page p is at t * pages + p.
    chosen
        Pages [queries, chosen], overwritten.
    group, kept, page_size, pages
        Sizes: where they are constants, the compiler unrolls loops. ``pages`` are those of a chunk.
    """
    tokens = page_size * pages
    queries, count = chosen.shape
    chunks = keys.shape[0]
    best = np.empty((group, chunks * pages), np.float32)
    products, channels = np.empty((group, tokens), np.float32), np.empty(tokens, np.float32)
    shares, bits = np.empty(chunks * pages, np.float32), np.empty(chunks * pages, np.int32)
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
            _, total = exponentiate(logits, bits)
            for page in range(chunks * pages):
                shares[page] += logits[page] / total
        order, found = shares.view(np.int32), 0  # of numbers above zero, bits are in the order of the numbers
        least = nth_largest(order, count)
        for page in range(chunks * pages):
            if order[page] > least and found < count:
                chosen[number, found] = page
                found += 1
        for page in range(chunks * pages):
            if order[page] == least and found < count:
                chosen[number, found] = page
                found += 1
        for place in range(found, count):  # all or none are shares that are not numbers
            chosen[number, place] = place


@register_jitable(inline="always")
def _attend(
    query: Floats,
    key: Floats,
    value: Floats,
    pages: NDArray[np.int64],
    output: Floats,
    logsumexp: Floats,
    width: int,
    group: int,
    page_size: int,
) -> None:
    """Let the query heads of one K-V head attend to each query's own pages; as a `Kernel` does."""
    queries, chosen = pages.shape
    weights = np.empty((group, chosen * page_size), np.float32)
    bits = np.empty(chosen * page_size, np.int32)
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
            largest, total = exponentiate(mine, bits)
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


@cache
def kernel_of(width: int, group: int, page_size: int) -> Kernel:
    """Return the kernel for these sizes."""

    @_compiled
    def attend(
        query: Floats,
        key: Floats,
        value: Floats,
        pages: NDArray[np.int64],
        output: Floats,
        logsumexp: Floats,
    ) -> None:
        _attend(query, key, value, pages, output, logsumexp, width, group, page_size)

    return attend


@cache
def joiner_of(width: int, group: int, kept: int, page_size: int, pages: int) -> Joiner:
    """Return the kernel for few queries and these sizes, with so many pages of a chunk."""

    @_compiled
    def join(
        query: Floats,
        scale: float,
        gates: Floats,
        heads: NDArray[np.int64],
        slots: int,
        memory: tuple[NDArray[Any], ...],
        place: int,
        chosen: NDArray[np.int64],
        output: Floats,
        logsumexp: Floats,
    ) -> None:
        rows, _, queries, _ = query.shape
        all_keys, all_values, all_channels, all_sketches, all_scales = memory
        asked, some = (
            np.empty((queries, group, width), np.float32),
            np.empty((queries, group, kept), np.float32),
        )
        far, far_logsumexp = np.empty_like(asked), np.empty((queries, group), np.float32)
        for row in range(rows):
            for held in range(len(heads)):
                first, channels = heads[held] * group, all_channels[row, place, held]
                for number in range(queries):
                    for head in range(group):
                        for channel in range(width):
                            asked[number, head, channel] = query[row, first + head, number, channel] * scale
                        for channel in range(kept):
                            some[number, head, channel] = asked[number, head, channels[channel]]
                sketch, scales = all_sketches[row, place, held], all_scales[row, place, held]
                these = chosen[row, held]
                choose(some, sketch[:slots], scales[:slots], these, group, kept, page_size, pages)
                keys, values = all_keys[row, place, held], all_values[row, place, held]
                _attend(asked, keys, values, these, far, far_logsumexp, width, group, page_size)
                for number in range(queries):
                    for head in range(group):
                        near, theirs = output[row, number, first + head], far[number, head]
                        ahead = far_logsumexp[number, head] + gates[first + head]
                        share = np.float32(1) / (1 + np.exp(logsumexp[row, first + head, number] - ahead))
                        for channel in range(width):
                            near[channel] += share * (theirs[channel] - near[channel])

    return join
