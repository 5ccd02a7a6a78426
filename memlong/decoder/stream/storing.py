"""Storing the chunks that leave a stream's window in its bank."""

from __future__ import annotations

from collections.abc import Sequence

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
    setup: Setup, stream: TokenStream, chunks: Sequence[Passage], window: LocalWindow, row: int
) -> None:
    """Store consecutive chunks of a stream, whose K-V is in a row of the window, unless they are stored already.

    Raises
    ------
    InvalidArgumentError
        If another model has stored chunks in the bank in the meantime.
    """
    bank = stream.bank
    if bank is None or setup.retriever is None or stream.has_stored(chunks):
        return
    keys, values = setup.source.collect(window, row, chunks[0].start, chunks[-1].end)
    size = setup.config.chunk_size
    spans = torch.tensor([(chunk.start, chunk.end) for chunk in chunks], device="cpu")
    embeddings = setup.retriever.embed_chunks(chunks)
    own = bank if isinstance(bank, MemoryBank) else None  # a draft is dropped with everything in it
    is_first = own is not None and not len(own.top)
    if own is not None and len(own) and own.origin != stream.bank_origin:
        check_origins([own], origin_of(setup))  # another decoder has stored there since
        stream.bank_origin = own.origin
    stream.storing_from = bank.next_id
    if setup.source.gradient_chunks and own is not None:
        _keep_latest(
            setup,
            stream,
            own.next_id,
            window.stacked(row, chunks[0].start, chunks[-1].end, setup.source.stored_layers),
        )
    bank.add(embeddings, _in_chunks(keys, size), _in_chunks(values, size), spans, check_first=False)
    if own is not None and is_first:
        own.origin = stream.bank_origin = origin_of(setup)


def _keep_latest(setup: Setup, stream: TokenStream, first_id: int, states: tuple[Tensor, Tensor]) -> None:
    """Keep the K-V of new chunks, and forget that of older ones."""
    each = zip(*(side.split(setup.config.chunk_size, dim=2) for side in states), strict=True)
    stream.latest |= {first_id + place: Block(*both) for place, both in enumerate(each)}
    for old in sorted(stream.latest)[: -setup.source.gradient_chunks]:
        del stream.latest[old]


def _in_chunks(states: Tensor, size: int) -> Tensor:
    """[layers, kv_heads, tokens, head_dim] -> [chunks, layers, kv_heads, size, head_dim]."""
    layers, heads, tokens, width = states.shape
    # [layers, kv_heads, chunks, size, head_dim] -> [chunks, layers, kv_heads, size, head_dim]
    return states.reshape(layers, heads, tokens // size, size, width).permute(2, 0, 1, 3, 4)
