"""Whether banks that a user gives can serve as memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from memlong.bank import ChunkLayout, MemoryBank
from memlong.decoder.model.machine import dtype_name, loading_in
from memlong.decoder.persistence.fingerprint import differences
from memlong.decoder.retrievers.base import Retriever
from memlong.errors import InvalidArgumentError


def check_origins(banks: Sequence[MemoryBank], ours: Mapping[str, Any]) -> None:
    """Refuse banks whose chunks another model made.

    Raises
    ------
    InvalidArgumentError
        Naming what differs from ``ours``, which is what this decoder would note down.
    """
    for bank in banks:
        odd = [] if bank.origin is None or not len(bank) else differences(ours, bank.origin)
        if odd:
            raise InvalidArgumentError(
                "banks holds a bank that another model filled, or this one with other settings, for which its keys, "
                f"values and embeddings were made; what differs: {', '.join(odd)}. Use those, or any_model=True if "
                "you know that they fit."
            )


def check_banks(
    banks: Sequence[MemoryBank], retriever: Retriever, layout: ChunkLayout
) -> tuple[MemoryBank, ...]:
    """Return the banks, one for each row.

    Raises
    ------
    InvalidArgumentError
        If one is no bank or comes twice, or does not fit the retriever's embeddings or the blocks of ``layout``.
    """
    if isinstance(banks, str) or not isinstance(banks, Sequence) or not banks:
        raise InvalidArgumentError(f"banks is {banks!r}; expected a sequence of banks, one for each row.")
    for bank in banks:
        if not isinstance(bank, MemoryBank):
            raise InvalidArgumentError(f"banks holds {bank!r}; expected a MemoryBank for each row.")
    if len({id(bank) for bank in banks}) < len(banks):
        raise InvalidArgumentError("banks holds one bank twice; rows never share a bank: give each its own.")
    for bank in banks:
        if (bank.dim, bank.metric) != (retriever.dim, retriever.metric):
            raise InvalidArgumentError(
                f"banks holds a bank of dim {bank.dim} and metric {bank.metric!r}, but the retriever "
                f"{type(retriever).__name__} embeds in dim {retriever.dim} for metric {retriever.metric!r}: make the "
                "bank with those, or use the retriever it was made for."
            )
        for what, ours in (("shape", layout.shape), ("dtype", layout.dtype), ("device", layout.device)):
            theirs = ours if bank.layout is None else getattr(bank.layout, what)
            if theirs != ours:
                raise InvalidArgumentError(
                    f"banks holds a bank of blocks of {what} {theirs}, but this decoder's are of {what} {ours} (a "
                    "shape is layers, K-V heads, chunk_size, head width): use what it was filled with."
                    + (f" To {loading_in(dtype_name(theirs))}." if isinstance(theirs, torch.dtype) else "")
                )
    return tuple(banks)
