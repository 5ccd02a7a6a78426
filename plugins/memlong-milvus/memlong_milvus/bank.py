"""MilvusBank: a bank searched by Milvus, embedded in this process or on a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, Unpack
from weakref import ref

import torch

from memlong.bank import IndexRows, KeyValueStore, MemoryBank
from memlong.bank.snapshot.options import options_to_save
from memlong.bank.snapshot.reader import StoredBank
from memlong.bank.uncopied import Uncopied
from memlong.errors import InvalidArgumentError
from memlong_milvus.collection import CollectionPlan, ready_collection
from memlong_milvus.engine import Engine
from memlong_milvus.hold import Hold
from memlong_milvus.hub import HUBS
from memlong_milvus.index import SessionIndex
from memlong_milvus.options import SAVED, OtherOptions, Tuning, check_resume, device_of
from memlong_milvus.payloads import Folder, PayloadStore
from memlong_milvus.place import find_place
from memlong_milvus.resume import kept_of
from memlong_milvus.rows import Consistency, SessionRows
from memlong_milvus.sessions import Session


class MilvusBank(Uncopied, MemoryBank):
    """A bank whose embeddings Milvus searches, and whose keys and values lie in a folder or an object store.

    All sessions share a collection, and each is searched alone. The bank keeps embeddings and spans of its own
    session in memory, scores what Milvus names by them, and so never returns what has left it or what is another's.
    What it added within the last `staleness` seconds, which Milvus may not show yet, it searches itself.

    A session without a name ends with its bank; one with a name stays, and `resume=True` goes on with it. A session is
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
    collection : str, optional
        Where the rows are; made if it is not there. By default one for each dim and kind of metric, as
        "memlong_384_ip".
    session : str, optional
        Whose memory this is; by default nobody's that has a name.
    resume : bool, default False
        Go on with what the session holds, if anything; without it, a session that holds chunks is refused.
    store : str or KeyValueStore, optional
        Where keys and values are: a folder or a URI that fsspec knows, such as ``s3://bucket/folder``. By default
        a folder beside the local file; for sessions without a name, a temporary one.
    consistency : {"bounded", "strong", "eventually"}, default "bounded"
        How current a server's answers are. A strong one waits, some 0.2 seconds, for all that was written. The
        bank finds what it added itself at once, whichever it is.
    staleness : float, default 10
        Seconds that a search may lag behind if it is not strong; more than the server's gracefulTime (5).
    M, ef_construction : int, default 16 and 200
        Of the HNSW graph, where the collection is made.
    ef : int, default 64
        Effort of searching; a search never uses less than it needs.
    partitions : int, default 16
        How many parts a collection has, where it is made; a session is in one of them, and a search looks at one.
    timeout : float, default 10
        Seconds that one attempt of a call may take.
    attempts : int, default 5
        How often a call is tried while nobody answers.
    readers : int, default 8
        Threads that read and write keys and values.
    kv_device : str, default "cpu"
        Where keys and values of a resumed session go, until others are added.
    **bank_options
        The options of `MemoryBank`.

    Raises
    ------
    InvalidArgumentError
        If an option cannot be used, the collection is for other embeddings, or the session is in use.
    BackendError
        If Milvus does not answer, or refuses.
    """

    index_class = SessionIndex
    saved_options = SAVED

    why_uncopied = "its chunks are in Milvus. Save it, and load it into a session of its own."

    def __init__(
        self,
        dim: int,
        *,
        uri: str | None = None,
        token: str | None = None,
        database: str | None = None,
        collection: str | None = None,
        session: str | None = None,
        resume: bool = False,
        store: str | KeyValueStore | None = None,
        consistency: Consistency = "bounded",
        staleness: float = 10.0,
        M: int = 16,  # noqa: N803 -- the paper's and the library's name
        ef_construction: int = 200,
        ef: int = 64,
        partitions: int = 16,
        timeout: float = 10.0,
        attempts: int = 5,
        readers: int = 8,
        kv_device: str = "cpu",
        **bank_options: Unpack[OtherOptions],
    ) -> None:
        self._tuning = Tuning(
            consistency, staleness, M, ef_construction, ef, partitions, timeout, attempts, readers
        )
        self._session = Session.of(session)
        check_resume(resume, named=self._session.named)
        blocks_go_to = device_of(kv_device)
        metric = bank_options.get("metric", "cosine")
        self._place = place = find_place(uri, token, database, store, self._session)
        self._given_collection = collection
        blocks, facts = place.store, {"dim": dim, "metric": metric}
        if blocks is None:
            blocks = PayloadStore(place.objects, readers=readers, lasting=self._session.named, facts=facts)
        self._blocks = blocks
        super().__init__(dim, store=blocks, **bank_options)
        self._hold = Hold(self, self._engine.hub, self._session, self._rows, self.state.table, blocks)
        if self._session.named:
            self._go_on(facts, resume=resume, kv_device=blocks_go_to)

    @property
    def session(self) -> str:
        """Name of the session: what `session` was given, or a random one."""
        return self._session.name

    @property
    def uri(self) -> str:
        """Where Milvus is, without user and password."""
        return self._engine.address.uri

    @property
    def collection(self) -> str:
        """Name of the collection that its rows are in."""
        return self._rows.collection

    @classmethod
    def reopen(cls, dim: int, *, session: str, **options: Any) -> Self:
        """Go on with a session, in this process or another; its chunks have the ids they had.

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
                "resume goes on with what a session holds, and a snapshot would take its place: load it into a session "
                "of another name, without resume"
            )
        return super().of_stored(stored, lazy=lazy, trust_index=trust_index, **options)

    def drop(self) -> None:
        """Remove the session from Milvus and from the store, down to its name; the bank is as after `reset`."""
        self.reset()
        if isinstance(self._blocks, PayloadStore):
            self._blocks.drop()

    def close(self) -> None:
        """Let go of the session; of one without a name nothing is left. The bank is of no use afterwards.

        Raises
        ------
        BackendError
            If what a session without a name has left cannot be removed.
        """
        with self.state.lock.write():
            self._hold.let_go()
            self._rows.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def make_index(self, rows: IndexRows, options: Mapping[str, Any]) -> SessionIndex:  # noqa: ARG002 - it has none
        """Find or make the collection, and the session's place in it."""
        tuning = self._tuning
        self._engine = Engine(HUBS.at(self._place.address), timeout=tuning.timeout, attempts=tuning.attempts)
        self._engine.hub.bury()
        name = self._given_collection or f"memlong_{rows.dim}_{'l2' if rows.similarity == 'l2' else 'ip'}"
        plan = CollectionPlan(
            name, rows.dim, rows.similarity, tuning.partitions, tuning.M, tuning.ef_construction
        )
        made = ready_collection(self._engine, plan)
        if isinstance(self._blocks, PayloadStore):
            self._blocks.settle(Folder(made.name, made.origin, self._session))
        self._rows = SessionRows(self._engine, made, self._session, tuning.consistency)
        is_current = self._engine.address.is_local or tuning.consistency == "strong"
        bank = ref(self)

        def next_id() -> int:
            owner = bank()
            return 0 if owner is None else owner.next_id

        self._session_index = SessionIndex(rows, self._rows, tuning, is_current=is_current, next_id=next_id)
        return self._session_index

    def options_to_save(self) -> dict[str, Any]:
        """Not where Milvus is: a snapshot must not lead another process, with its token, to a place of its choice."""
        return options_to_save(self._tuning.as_options(), self.saved_options)

    def _go_on(self, facts: dict[str, Any], *, resume: bool, kv_device: torch.device) -> None:
        try:
            kept = kept_of(self._rows, self._blocks, facts, resume=resume, kv_device=kv_device)
        except BaseException:
            self._hold.let_go()  # at once: whoever catches this may ask for the session again
            raise
        with self.state.lock.write():
            self.state.fill(kept.ids, kept.embeddings, kept.spans, kept.layout, kept.next_id)
            self._session_index.take_over()  # rebuilt before the first search: rows left by an interrupted change go
