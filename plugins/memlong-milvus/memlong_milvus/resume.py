"""What a session holds that an earlier bank has left, from its rows and its objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from memlong.bank import ChunkLayout, Floats, Ids, KeyValueStore
from memlong.errors import InvalidArgumentError
from memlong_milvus.payloads import PayloadStore
from memlong_milvus.rows import SessionRows, StoredRows


@dataclass(frozen=True, eq=False)
class Kept:
    """Chunks that have both a row and an object.

    Attributes
    ----------
    ids, embeddings, spans : numpy.ndarray
        One of each a chunk, ids ascending.
    layout : ChunkLayout or None
        Of their keys and values; None where there are none.
    next_id : int
        Above all ids that the session ever gave.
    """

    ids: Ids
    embeddings: Floats
    spans: Ids
    layout: ChunkLayout | None
    next_id: int


def kept_of(
    rows: SessionRows, store: KeyValueStore, facts: dict[str, Any], *, resume: bool, kv_device: torch.device
) -> Kept:
    """Return what a session with a name holds, for a bank to go on with.

    Parameters
    ----------
    rows, store
        Where it is; a `PayloadStore` adopts what it has of it.
    facts : dict
        The bank's dim and metric, which the session must have been made with.
    resume : bool
        Whether to go on with anything.
    kv_device : torch.device
        Where its keys and values go.

    Raises
    ------
    InvalidArgumentError
        If the session holds chunks that are not to be gone on with, or was made with another dim or metric.
    """
    if isinstance(store, PayloadStore):
        if resume:
            return _take_over(rows, store, facts, kv_device)
        _refuse_what_is_there(rows, store)
    elif resume:
        raise InvalidArgumentError(
            f"resume needs keys and values where MilvusBank put them, and store is {store!r}: give the folder or URI "
            "that the session began with"
        )
    none = _none(rows.dim)
    return Kept(none.ids, none.embeddings, none.spans, None, 0)


def _refuse_what_is_there(rows: SessionRows, store: PayloadStore) -> None:
    stored = store.stored_ids()
    if stored or store.stored_facts() or not rows.is_empty():
        raise InvalidArgumentError(
            f"the session {rows.session.name!r} is there already, with {len(stored)} chunks in {store.place!r}: "
            "resume=True goes on with it, and MilvusBank.reopen(...).drop() removes it"
        )


def _take_over(
    rows: SessionRows, store: PayloadStore, facts: dict[str, Any], kv_device: torch.device
) -> Kept:
    """Return the chunks with both a row and an object: one without the other is left of a change that was cut short."""
    noted = store.stored_facts()
    for name, ours in facts.items():
        if noted.get(name, ours) != ours:
            raise InvalidArgumentError(
                f"the session {rows.session.name!r} was made with {name} {noted[name]!r}, but the bank has {ours!r}: "
                f"give {name}={noted[name]!r}"
            )
    stored = np.array(store.stored_ids(), dtype=np.int64)
    newest = max([int(noted.get("newest", -1)), *stored[-1:].tolist()])
    parts = [_none(rows.dim), *rows.read(stored)]
    ids = np.concatenate([part.ids for part in parts])
    embeddings = np.concatenate([part.embeddings for part in parts])
    spans = np.concatenate([part.spans for part in parts])
    layout = store.adopt(ids.tolist(), newest, kv_device)
    count = 0 if layout is None else len(ids)
    return Kept(ids[:count], embeddings[:count], spans[:count], layout, newest + 1)


def _none(dim: int) -> StoredRows:
    return StoredRows(
        np.empty(0, dtype=np.int64), np.empty((0, dim), dtype=np.float32), np.empty((0, 2), dtype=np.int64)
    )
