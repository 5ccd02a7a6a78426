"""MilvusBank: a bank searched by Milvus, embedded in this process or on a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self
from weakref import ref

import torch

from memlong.bank import IndexRows, KeyValueStore, MemoryBank, ObjectFolder
from memlong.bank.snapshot.reader import StoredBank
from memlong.bank.uncopied import Uncopied
from memlong.errors import InvalidArgumentError
from memlong_milvus.collection import METRICS, Collection, ready_collection
from memlong_milvus.engine import Engine
from memlong_milvus.hold import Hold
from memlong_milvus.hub import HUBS
from memlong_milvus.index import SessionIndex
from memlong_milvus.options import MilvusOptions
from memlong_milvus.place import address_of, objects_of
from memlong_milvus.rows import SessionRows
from memlong_milvus.sessions import Session
from memlong_milvus.store import SessionStore, refuse_what_is_there, take_over


class MilvusBank(Uncopied, MemoryBank):
    """A bank whose embeddings Milvus searches, and whose keys and values lie in a folder or an object store.

    All sessions share a collection, and each is searched alone. The bank keeps embeddings and spans of its own
    session in memory, scores what Milvus names by them, and so never returns what has left it or what is another's.
    What it added within the last `staleness` seconds, which Milvus may not show yet, it searches itself.

    A session without a name ends with its bank; one with a name stays, and `resume=True` continues it. A session is
    one bank's at a time. `close`, or a `with` statement, lets go of it; so does a bank that nobody uses any more.

    Parameters
    ----------
    dim : int
        Width of the embeddings.
    uri : str, optional
        A local file that ends in .db, for Milvus Lite in this process, or ``http[s]://host:19530[/database]`` of a
        server. By default what the environment has as MEMLONG_MILVUS_URI; without it, Milvus Lite in a file that
        goes when the process does.
    token : str, optional
        "user:password" or an API key; by default what the environment has as MEMLONG_MILVUS_TOKEN.
    database : str, optional
        Of the server, if not the default one.
    store : str or KeyValueStore, optional
        Where keys and values are: a folder or a URI that fsspec knows, such as ``s3://bucket/folder``. By default
        a folder next to the local file; for sessions without a name, a temporary one.
    **bank_options
        The options of `MemoryBank` and of `MilvusOptions`.

    Attributes
    ----------
    engine : Engine
        The Milvus, as it is asked.
    rows : SessionRows
        Of the session, there.

    Raises
    ------
    InvalidArgumentError
        If an option cannot be used, the collection is for other embeddings, or the session is in use.
    BackendError
        If Milvus does not answer, or refuses.
    """

    index_class = SessionIndex

    why_uncopied = "its chunks are in Milvus. Save it, and load it into a session of its own."

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
            folder = ObjectFolder(
                objects, readers=options.readers, lasting=True, notes={**facts, "newest": -1}
            )
            store = SessionStore(folder, named=self._session.named)
        self._blocks = store
        self._is_closed = False
        super().__init__(dim, store=store, **bank_options)
        self._hold = Hold(self, self.engine, self._session, self.rows, self.state.table, store)
        if self._session.named:
            self._begin(facts, options)

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

        How often and how lately chunks were retrieved is not kept, but for what `save` writes: an eviction policy
        begins with the order of their ids.

        Parameters
        ----------
        dim : int
            Width of the embeddings.
        session : str
            Its name.
        **options
            The options of `MilvusBank`, with the place that the session is at.

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
        """Remove the session from Milvus and from the store, down to its name; the bank is as after `reset`."""
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
        if self._is_closed:
            return
        with self.state.lock.write():
            self._hold.let_go()
            self.rows.close()
            self._is_closed = True
        self.refuse_changes(  # which would reach another bank's rows and objects
            f"the bank of the session {self.session!r} is closed; another one can continue a session that has a name: "
            "MilvusBank.reopen"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def make_index(self, rows: IndexRows, options: Mapping[str, Any]) -> SessionIndex:
        """Find or make the collection, and the session's place in it."""
        chosen = SessionIndex.make_options(options)
        self.engine = Engine(HUBS.at(self._address), timeout=chosen.timeout, attempts=chosen.attempts)
        self.engine.hub.bury()
        name = (
            chosen.collection
            if chosen.collection is not None
            else f"memlong_{rows.dim}_{'l2' if rows.similarity == 'l2' else 'ip'}"
        )
        wanted = Collection(name, rows.dim, METRICS[rows.similarity], chosen.partitions)
        made = ready_collection(self.engine, wanted, links=chosen.M, effort=chosen.ef_construction)
        if isinstance(self._blocks, SessionStore):
            self._blocks.folder.name = f"{made.name}-{made.origin}/{self._session.key}"
        self.rows = SessionRows(self.engine, made, self._session, chosen.consistency)
        bank = ref(self)

        def next_id() -> int:
            owner = bank()
            return 0 if owner is None else owner.next_id

        self._session_index = SessionIndex(rows, chosen, self.rows, next_id)
        return self._session_index

    def _begin(self, facts: Mapping[str, Any], options: MilvusOptions) -> None:
        """Continue a session with a name, or see that it is new."""
        try:
            if not isinstance(self._blocks, SessionStore):
                if options.resume:
                    raise InvalidArgumentError(
                        f"resume needs keys and values where MilvusBank put them, and store is {self._blocks!r}: give "
                        "the folder or URI that the session began with"
                    )
                return
            if not options.resume:
                refuse_what_is_there(self.rows, self._blocks)
                return
            kept = take_over(self.rows, self._blocks, facts, torch.device(options.kv_device))
        except BaseException:
            self._hold.let_go()  # at once: whoever catches this may ask for the session again
            raise
        with self.state.lock.write():
            self.state.fill(kept.ids, kept.embeddings, kept.spans, kept.layout, kept.next_id)
            self._session_index.take_over()  # rebuilt before the first search: rows left by an interrupted change go
