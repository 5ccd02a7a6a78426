"""Whether banks that a user passes in can serve as memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from memlong.bank import ChunkLayout, MemoryBank
from memlong.decoder.model.machine import dtype_name, loading_in
from memlong.decoder.persistence.fingerprint import differences, origin_of
from memlong.decoder.retrievers.base import Retriever
from memlong.decoder.setup import Setup
from memlong.errors import InvalidArgumentError


def check_origins(banks: Sequence[MemoryBank], ours: Mapping[str, Any]) -> None:
    """Refuse banks whose chunks another model made.

    Raises
    ------
    InvalidArgumentError
        Naming what differs from ``ours``, this decoder's origin.
    """
    for bank in (layer for each in banks for layer in (each.top, *each.bases)):
        odd = [] if bank.origin is None or not len(bank) else differences(ours, bank.origin)
        if odd:
            raise InvalidArgumentError(
                "banks holds a bank that another model filled, or this one with other settings, for which its keys, "
                f"values and embeddings were made; what differs: {', '.join(odd)}. Use those, or any_model=True if "
                "you know that they fit"
            )


def check_banks(
    banks: Sequence[MemoryBank], setup: Setup, *, any_model: bool = False
) -> tuple[MemoryBank, ...]:
    """Return the banks that a user passed in, one for each row.

    Raises
    ------
    InvalidArgumentError
        If one is not a bank or is given twice, or does not fit the retriever's embeddings or the decoder's blocks; or,
        unless ``any_model``, if another model filled it.
    """
    if setup.retriever is None or setup.config.backend is None:
        raise InvalidArgumentError("banks need a backend, but the configuration has backend=None: name one")
    if isinstance(banks, str) or not isinstance(banks, Sequence) or not banks:
        raise InvalidArgumentError(f"banks must be a sequence of banks, one for each row, got {banks!r}")
    for bank in banks:
        if not isinstance(bank, MemoryBank):
            raise InvalidArgumentError(f"banks must hold a MemoryBank for each row, got {bank!r}")
    tops = {id(bank.top) for bank in banks}
    if len(tops) < len(banks) or any(id(base) in tops for bank in banks for base in bank.bases):
        raise InvalidArgumentError(
            "banks holds one bank twice; rows never share a bank that is written to: give each its own"
        )
    if setup.config.position_mode == "original" and any(bank.bases for bank in banks):
        raise InvalidArgumentError(
            "position_mode must not be 'original' over bases, whose chunks stood in other texts: use 'before-window', "
            "or another"
        )
    for bank in banks:
        _check_fit(bank, setup.retriever, setup.block_layout)
    if not any_model and any(layer.origin is not None for bank in banks for layer in (bank.top, *bank.bases)):
        check_origins(banks, origin_of(setup))
    return tuple(banks)


def _check_fit(bank: MemoryBank, retriever: Retriever, block_layout: ChunkLayout) -> None:
    if (bank.dim, bank.metric) != (retriever.dim, retriever.metric):
        raise InvalidArgumentError(
            f"banks must have dim {retriever.dim} and metric {retriever.metric!r}, as the retriever "
            f"{type(retriever).__name__} embeds, got a bank of dim {bank.dim} and metric {bank.metric!r}: make the "
            "bank with those, or use the retriever it was made for"
        )
    for what in ("shape", "dtype", "device"):
        ours = getattr(block_layout, what)
        theirs = ours if bank.layout is None else getattr(bank.layout, what)
        if theirs != ours:
            raise InvalidArgumentError(
                f"banks must have blocks of {what} {ours}, as this decoder's, got a bank with blocks of {what} "
                f"{theirs} (a shape is layers, K-V heads, chunk_size, head width): use what it was filled with"
                + (f". To {loading_in(dtype_name(theirs))}" if isinstance(theirs, torch.dtype) else "")
            )
