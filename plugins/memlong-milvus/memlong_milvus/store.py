"""The keys and values of a session: objects in its folder, and what an earlier bank has left there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from memlong.bank import ChunkLayout, Floats, Ids, ObjectFolder, TieredStore
from memlong.errors import InvalidArgumentError
from memlong_milvus.rows import SessionRows

_MOST_ID = 10**18


class SessionStore(TieredStore):
    """Objects in the session's folder; of a named one, the newest id is noted there before its chunk goes."""

    def __init__(self, folder: ObjectFolder, *, named: bool) -> None:
        super().__init__(objects=folder)
        self.folder, self._named, self.newest = folder, named, -1

    def put(self, ids: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write objects."""
        super().put(ids, keys, values)
        self.newest = max(self.newest, *ids)

    def remove(self, ids: Sequence[int]) -> None:
        """Remove objects."""
        self._note_newest(ids)
        super().remove(ids)

    def clear(self) -> None:
        """Remove all objects, but not the notes."""
        self._note_newest([self.newest] if self.newest in self else [])
        super().clear()

    def _note_newest(self, leaving: Sequence[int]) -> None:
        if self._named and self.newest in leaving:
            self.folder.note({"newest": self.newest})


def take_over(
    rows: SessionRows, store: SessionStore, facts: Mapping[str, Any], device: torch.device
) -> tuple[Ids, Floats, Ids, ChunkLayout | None, int]:
    """Return what a session holds, after its store has adopted the keys and values.

    These are ids, embeddings, spans and layout of the chunks that have both a row and an object (one without the other
    is left of an interrupted change), and an id above all that the session ever gave. InvalidArgumentError if the
    session was made with another dim or metric than the bank's ``facts``.
    """
    noted = store.folder.notes()
    newest = noted.get("newest", -1)
    if type(newest) is not int or not -1 <= newest <= _MOST_ID:
        raise store.folder.damaged(f"its newest is {newest!r:.50}, which is no id of a chunk")
    for name, ours in facts.items():
        if noted.get(name, ours) != ours:
            raise InvalidArgumentError(
                f"the session {rows.session.name!r} was made with {name} {noted[name]!r}, but the bank has {ours!r}: "
                f"give {name}={noted[name]!r}"
            )
    stored = np.array(store.folder.ids(), dtype=np.int64)
    store.newest = max([newest, *stored[-1:].tolist()])
    ids, embeddings, spans = rows.read(stored)
    layout = store.adopt(ids.tolist(), device)
    count = 0 if layout is None else len(ids)
    return ids[:count], embeddings[:count], spans[:count], layout, store.newest + 1


def refuse_what_is_there(rows: SessionRows, store: SessionStore) -> None:
    """Raise InvalidArgumentError if a session that is to begin is there already."""
    stored = store.folder.ids()
    if stored or store.folder.notes() or len(rows.held()):
        raise InvalidArgumentError(
            f"the session {rows.session.name!r} is there already, with {len(stored)} chunks in "
            f"{store.folder.place!r}: resume=True continues it, and MilvusBank.reopen(...).drop() removes it"
        )
