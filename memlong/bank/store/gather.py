"""Fetch the keys and values of a search's hits, with zeros where a hit is missing."""

from __future__ import annotations

import numpy as np
import torch

from memlong.bank.arrays import Ids
from memlong.bank.layout import UNKNOWN, ChunkLayout
from memlong.bank.store.copying import to_device
from memlong.bank.store.store import KeyValueStore


def gather(store: KeyValueStore, layout: ChunkLayout | None, ids: Ids) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values [q, k, layers, kv_heads, chunk, head_dim] of ids [q, k].

    Parameters
    ----------
    store : KeyValueStore
        Store that holds every id except -1.
    layout : ChunkLayout or None
        Layout of its blocks; None if nothing was ever stored.
    ids : numpy.ndarray
        int64 [q, k]; -1 means missing and gives zeros.
    """
    layout = layout or UNKNOWN
    wanted = ids.ravel()
    present = np.flatnonzero(wanted >= 0)
    if not len(present):
        return layout.empty(*ids.shape), layout.empty(*ids.shape)
    keys, values = store.get(wanted[present].tolist())
    if len(present) < len(wanted):
        where = to_device(torch.from_numpy(present), layout.device)
        keys = layout.empty(len(wanted)).index_copy_(0, where, keys)
        values = layout.empty(len(wanted)).index_copy_(0, where, values)
    shape = (*ids.shape, *layout.shape)
    return keys.view(shape), values.view(shape)
