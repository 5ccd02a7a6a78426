"""MilvusBank: a bank searched by Milvus, embedded in this process or on a server."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn, Self

import torch

from memlong.bank import IndexRows, KeyValueStore, MemoryBank, ObjectFolder
from memlong.bank.snapshot.reader import StoredBank
from memlong.errors import InvalidArgumentError, MemlongError
from memlong_milvus.collection import METRICS, ready_collection
from memlong_milvus.connection import Engine, Hub
from memlong_milvus.index import SessionIndex
from memlong_milvus.options import MilvusOptions
from memlong_milvus.rows import SessionRows
from memlong_milvus.sessions import Session
from memlong_milvus.store import SessionStore, refuse_what_is_there, take_over
from memlong_milvus.uri import address_of, objects_of


class MilvusBank(MemoryBank):
    """A bank whose embeddings Milvus searches, and whose keys and values are in a folder or an object store.

    All sessions share a collection, and each is searched alone. The bank keeps embeddings and spans of its own session
    in memory and scores what Milvus names by them, so it never returns what has left it or is another's. What it added
    within the last `staleness` seconds, which Milvus may not show yet, it searches itself.

    A session without a name ends with its bank; one with a name stays, and `resume=True` continues it. A session
    belongs to one bank at a time, until `close`, the end of a `with` statement, or the end of the bank.

    Parameters
    ----------
    dim : int
        Width of the embeddings.
    uri : str, optional
        A local file that ends in .db, for Milvus Lite in this process, or ``http[s]://host:19530[/database]`` of a
        server. By default that of the environment (MEMLONG_MILVUS_URI); without it, a temporary local file.
    token : str, optional
        "user:password" or an API key; by default that of the environment (MEMLONG_MILVUS_TOKEN).
    database : str, optional
        Database of the server, if not the default one.
    store : str or KeyValueStore, optional
        Where keys and values are: a folder or a URI that fsspec knows, such as ``s3://bucket/folder``. By default
        a folder next to the local file; for sessions without a name, a temporary one.
    **bank_options
        The options of `MemoryBank` and of `MilvusOptions`.

    Raises
    ------
    InvalidArgumentError
        If an option cannot be used, the collection is for other embeddings, or the session is in use.
    BackendError
        If Milvus does not answer, or refuses.
    """

    index_class = SessionIndex

    def __init__(
        self,
        dim: int,
        *,
        uri: str | None = None,
        token: str | None = None,
        database: str | None = None,
        store: str | KeyValueStore | None = None,
        **bank_options: Any,
    ) -> None:
        given = {name: bank_options[name] for name in vars(MilvusOptions()) if name in bank_options}
        options = SessionIndex.make_options(given)
        self._session = Session.of(options.session)
        self._address = address_of(uri, token, database)
        facts = {"dim": dim, "metric": bank_options.get("metric", "cosine"), "session": self._session.name}
        if not isinstance(store, KeyValueStore):
            objects = objects_of(store, self._address, self._session)
            notes = {**facts, "newest": -1}
            folder = ObjectFolder(objects, readers=options.readers, lasting=True, notes=notes)
            store = SessionStore(folder, named=self._session.named)
        self._blocks = store
        super().__init__(dim, store=store, **bank_options)
        self._end = partial(_end, self.engine.hub, self.rows, self.index.rows, store)
        key = f"{self.collection}/{self._session.key}"
        self._claim = self.engine.hub.claim(self, key, self.session, self._end)
        if self._session.named:
            try:
                self._begin(facts, options)
            except BaseException:
                self._let_go()  # at once: the caller may catch this and ask for the session again
                raise

    @property
    def session(self) -> str:
        """Name of the session: what `session` was given, or a random one."""
        return self._session.name

    @property
    def uri(self) -> str:
        """Where Milvus is, without user and password."""
        return self.engine.address.uri

    @property
    def collection(self) -> str:
        """Name of the collection that its rows are in."""
        return self.rows.collection.name

    @classmethod
    def reopen(cls, dim: int, *, session: str, **options: Any) -> Self:
        """Continue a session, in this process or another; its chunks have the ids they had.

        How often and how recently chunks were retrieved is only in what `save` writes: an eviction policy begins with
        the order of their ids.

        Parameters
        ----------
        dim : int
            Width of the embeddings.
        session : str
            Its name.
        **options
            The options of `MilvusBank`, with the place of the session.

        Raises
        ------
        InvalidArgumentError, BackendError
            As the class does; also if the session was made with another dim or metric.
        """
        bank = cls(dim, session=session, resume=True, **options)
        if not bank.next_id:
            bank.close()
            raise InvalidArgumentError(
                f"there is no session {session!r} in the collection {bank.collection!r} at {bank.uri} with this store. "
                "Was it made with another dim, metric, collection or store?"
            )
        return bank

    @classmethod
    def of_stored(
        cls, stored: StoredBank, *, lazy: bool = False, trust_index: bool = False, **options: Any
    ) -> Self:
        """Make a bank as `MemoryBank.load` does; never of a session that is there, whose chunks would be lost."""
        if options.get("resume"):
            raise InvalidArgumentError(
                "resume continues what a session holds, and a snapshot would take its place: load it into a session "
                "of another name, without resume"
            )
        return super().of_stored(stored, lazy=lazy, trust_index=trust_index, **options)

    def drop(self) -> None:
        """Remove the session from Milvus and from the store, with its name; the bank is as after `reset`."""
        self.reset()
        if isinstance(self._blocks, SessionStore):
            self._blocks.folder.drop()

    def close(self) -> None:
        """Let go of the session; of one without a name nothing is left. The bank is of no use afterwards.

        With the last bank at a local file, Milvus Lite lets go of the file, too.

        Raises
        ------
        BackendError
            If what a session without a name has left cannot be removed.
        """
        if self.rows.why_closed:
            return
        with self.state.lock.write():
            self._let_go()
            self.rows.why_closed = (
                f"the bank of the session {self.session!r} is closed; another one can continue a session that has a "
                "name: MilvusBank.reopen"
            )
        self.refuse_changes(self.rows.why_closed)  # which would reach another bank's rows and objects

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise MemlongError(
            "A MilvusBank cannot be copied or pickled: its chunks are in Milvus. Save it, and load it into a session "
            "of its own"
        )

    def make_index(self, rows: IndexRows, options: Mapping[str, Any]) -> SessionIndex:
        """Find or make the collection, and the session's place in it."""
        chosen = SessionIndex.make_options(options)
        name = chosen.collection
        if name is None:
            name = f"memlong_{rows.dim}_{'l2' if rows.similarity == 'l2' else 'ip'}"
        self.engine = Engine(self._address, timeout=chosen.timeout, attempts=chosen.attempts)
        try:
            collection = ready_collection(
                self.engine,
                name,
                rows.dim,
                METRICS[rows.similarity],
                partitions=chosen.partitions,
                links=chosen.M,
                effort=chosen.ef_construction,
            )
        except BaseException:
            self.engine.close()  # at once: an error that is kept would keep Milvus Lite's file, too
            raise
        if isinstance(self._blocks, SessionStore):
            self._blocks.folder.name = f"{name}-{collection.origin}/{self._session.key}"
        self.rows = SessionRows(self.engine, collection, self._session, chosen.consistency)
        self._session_index = SessionIndex(rows, chosen, self.rows)
        return self._session_index

    def _begin(self, facts: Mapping[str, Any], options: MilvusOptions) -> None:
        """Continue a session with a name, or check that it is new."""
        if not isinstance(self._blocks, SessionStore):
            if options.resume:
                raise InvalidArgumentError(
                    f"resume needs keys and values where MilvusBank put them, and store is {self._blocks!r}: give the "
                    "folder or URI that the session began with"
                )
        elif options.resume:
            kept = take_over(self.rows, self._blocks, facts, torch.device(options.kv_device))
            with self.state.lock.write():
                self.state.fill(*kept)
                self._session_index.take_over()  # the index is rebuilt first: rows of an interrupted change go
        else:
            refuse_what_is_there(self.rows, self._blocks)

    def _let_go(self) -> None:
        if self._claim.alive:
            self._end()
            self._claim.detach()
            self.engine.close()


def _end(hub: Hub, rows: SessionRows, held: IndexRows, store: KeyValueStore) -> None:
    """Remove a session without a name."""
    if rows.session.named:
        return
    if not hub.has_ended:  # the next process to open the file removes rows without a name
        rows.delete(held.ids)
    if isinstance(store, SessionStore):
        store.folder.drop()
