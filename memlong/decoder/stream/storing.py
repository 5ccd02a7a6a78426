"""Storing the chunks that leave the streams' windows in their banks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from memlong.bank import MemoryBank
from memlong.decoder.kv.window import LocalWindow
from memlong.decoder.persistence.fingerprint import origin_of
from memlong.decoder.retrievers.base import Passage
from memlong.decoder.setup import Setup
from memlong.decoder.stream.banks import check_origins
from memlong.decoder.stream.retrieval import Block
from memlong.decoder.stream.token_stream import TokenStream


def store_chunks(
    setup: Setup,
    streams: Sequence[TokenStream],
    leaving: Mapping[int, Sequence[Passage]],
    window: LocalWindow,
) -> None:
    """Store consecutive chunks that leave the rows' windows, unless they are stored already, and have them depart.

    The retriever embeds those of all rows in one call. After an error, the rows before that of the error are done.

    Parameters
    ----------
    setup
        The model, its memory settings, and the parts made for them.
    streams
        Of all rows.
    leaving
        By row, its chunks, at least one.
    window
        Holds their K-V.

    Raises
    ------
    InvalidArgumentError
        If another model has stored chunks in a bank in the meantime.
    """
    embeddings = _embedded(setup, streams, leaving)
    ours = cache(lambda: origin_of(setup))  # of milliseconds, and the same for all rows
    for row, chunks in leaving.items():
        if row in embeddings:
            first, last = chunks[0].start, chunks[-1].end
            _store(
                streams[row], chunks, embeddings[row], setup.source.collect(window, row, first, last), ours
            )
            if setup.source.gradient_chunks:
                _keep_latest(
                    setup, streams[row], window.stacked(row, first, last, setup.source.stored_layers)
                )
        streams[row].depart(len(chunks))


def _embedded(
    setup: Setup, streams: Sequence[TokenStream], leaving: Mapping[int, Sequence[Passage]]
) -> dict[int, Tensor]:
    """Return the embeddings [chunks, dim] of the rows that have something to store."""
    if setup.retriever is None:
        return {}
    storing = {
        row: chunks
        for row, chunks in leaving.items()
        if streams[row].bank is not None and not streams[row].has_stored(chunks)
    }
    if not storing:
        return {}
    together = setup.retriever.embed_chunks(
        [streams[row].embedded(chunk) for row, chunks in storing.items() for chunk in chunks]
    )
    ends = accumulate(map(len, storing.values()))
    return {row: together[end - len(storing[row]) : end] for row, end in zip(storing, ends, strict=True)}


def _store(
    stream: TokenStream,
    chunks: Sequence[Passage],
    embeddings: Tensor,
    states: tuple[Tensor, Tensor],
    ours: Callable[[], Mapping[str, Any]],
) -> None:
    """Store chunks of one stream, with keys and values [layers, kv_heads, tokens, head_dim], in its bank."""
    bank = stream.bank
    assert bank is not None  # noqa: S101 - the plain window stores nothing
    own = bank if isinstance(bank, MemoryBank) else None  # a draft is dropped with everything in it
    is_first = own is not None and not len(own.top)
    if own is not None and len(own) and own.origin != stream.bank_origin:
        check_origins([own], ours())  # another decoder has stored there since
        stream.bank_origin = own.origin
    spans = torch.tensor([(chunk.start, chunk.end) for chunk in chunks], device="cpu")
    stream.storing_from = bank.next_id
    keys, values = (_in_chunks(each, stream.config.chunk_size) for each in states)
    bank.add(embeddings, keys, values, spans, check_first=False)
    if own is not None and is_first:
        own.origin = stream.bank_origin = ours()


def _keep_latest(setup: Setup, stream: TokenStream, states: tuple[Tensor, Tensor]) -> None:
    """Keep the K-V [layers, kv_heads, tokens, head_dim] of chunks just stored, and forget that of older ones."""
    if not isinstance(stream.bank, MemoryBank):
        return
    each = zip(*(side.split(setup.config.chunk_size, dim=2) for side in states), strict=True)
    blocks = [Block(*both) for both in each]
    stream.latest |= dict(
        zip(range(stream.bank.next_id - len(blocks), stream.bank.next_id), blocks, strict=True)
    )
    for old in sorted(stream.latest)[: -setup.source.gradient_chunks]:
        del stream.latest[old]


def _in_chunks(states: Tensor, size: int) -> Tensor:
    """[layers, kv_heads, tokens, head_dim] -> [chunks, layers, kv_heads, size, head_dim]."""
    layers, heads, tokens, width = states.shape
    # [layers, kv_heads, chunks, size, head_dim] -> [chunks, layers, kv_heads, size, head_dim]
    return states.reshape(layers, heads, tokens // size, size, width).permute(2, 0, 1, 3, 4)
