"""Hold: a bank's hold on its session, which no other bank of the process may have at the time."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from memlong.bank import KeyValueStore
from memlong.bank.index.table import ChunkTable
from memlong_milvus.engine import Engine
from memlong_milvus.rows import SessionRows
from memlong_milvus.sessions import Session
from memlong_milvus.store import SessionStore


class Hold:
    """A hold that lasts until it is let go of, or until its bank is gone.

    Parameters
    ----------
    bank : object
        Whose it is; not kept.
    engine : Engine
        The bank's; its hub knows who holds what.
    session : Session
        What is held.
    rows, table, store
        What the bank has of it. If the session has no name, rows and objects go with the hold.

    Raises
    ------
    InvalidArgumentError
        If another bank of this process has the session.
    """

    def __init__(
        self,
        bank: object,
        engine: Engine,
        session: Session,
        rows: SessionRows,
        table: ChunkTable,
        store: KeyValueStore,
    ) -> None:
        self._engine, self._key = engine, f"{rows.collection.name}/{session.key}"
        self._end = None if session.named else _ending(engine, rows, table, store)
        engine.hub.claim(self._key, session.name, self._end)
        self._finalizer = weakref.finalize(bank, engine.hub.release, self._key)
        self._finalizer.atexit = False

    def let_go(self) -> None:
        """Remove what is to go with it, and leave the session to others; nothing happens the second time."""
        if not self._finalizer.alive:
            return
        if self._end is not None:
            self._end()
        self._finalizer.detach()
        self._engine.hub.forget(self._key)
        self._engine.close()


def _ending(engine: Engine, rows: SessionRows, table: ChunkTable, store: KeyValueStore) -> Callable[[], None]:
    def end() -> None:
        if not engine.hub.has_ended:  # who opens it next removes rows without a name
            rows.delete(table.ids)
        if isinstance(store, SessionStore):
            store.folder.drop()

    return end
