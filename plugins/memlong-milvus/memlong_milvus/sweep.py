"""What an operator runs: sweep removes objects that no row refers to, purge the rows of sessions without a name."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from memlong.bank import StoredObject, objects_at
from memlong.errors import InvalidArgumentError
from memlong_milvus.collection import Collection, find_collection
from memlong_milvus.connection import Engine
from memlong_milvus.rows import SessionRows
from memlong_milvus.sessions import LEAST_UNNAMED, Session
from memlong_milvus.uri import address_of

_BLOCK = re.compile(
    r"(?P<collection>[^/]+-[0-9a-f]+)/(?P<key>[0-9a-f]{32})/"
    r"((?P<id>0|[1-9][0-9]{0,17})\.kv|0[0-9]{1,17}\.kv|\.[0-9]+\.kv\.[0-9]+\.part)"
)


@dataclass(frozen=True)
class Swept:
    """What a sweep found.

    Attributes
    ----------
    orphans : int
        Objects of chunks without a row, old enough; removed, except in a dry run.
    young : int
        Objects without a row that may be about to get one.
    living : int
        Objects that rows refer to.
    passed_over : tuple of str
        Collections, with their origin, that this Milvus does not have: their objects are another's, and stay.
    """

    orphans: int
    young: int
    living: int
    passed_over: tuple[str, ...]


def sweep(
    store: str,
    *,
    uri: str | None = None,
    token: str | None = None,
    database: str | None = None,
    grace: float = 3600.0,
    dry_run: bool = False,
    timeout: float = 10.0,
    attempts: int = 5,
) -> Swept:
    """Remove the keys and values that no row refers to: what a client that was killed has left behind.

    An object is written before its row and removed after it, so one without a row is an orphan, unless it is so young
    that its row may be on the way. Banks may be in use meanwhile.

    Parameters
    ----------
    store : str
        The folder or URI that banks were given as `store`.
    uri, token, database, timeout, attempts
        As `MilvusBank` takes them.
    grace : float, default 3600
        Seconds that an object without a row is left alone, by the clock of its store; one without a date stays.
    dry_run : bool, default False
        Count only.

    Raises
    ------
    InvalidArgumentError
        If there is no uri, or an argument cannot be used.
    BackendError
        If Milvus does not answer; nothing more is removed then.
    """
    if not isinstance(grace, int | float) or isinstance(grace, bool) or not grace >= 0:
        raise InvalidArgumentError(f"grace must be a number of seconds of at least 0, got {grace!r}")
    orphans = young = living = 0
    passed_over = []
    with _engine("sweep", uri, token, database, timeout, attempts) as engine:
        objects, before = objects_at(store), time.time() - grace
        listed: dict[str, dict[str, list[StoredObject]]] = defaultdict(lambda: defaultdict(list))
        for each in objects.list():  # before any row is read: a row that comes later counts
            if parts := _BLOCK.fullmatch(each.name):
                listed[parts["collection"]][parts["key"]].append(each)
        for folder, sessions in listed.items():
            name, _, origin = folder.rpartition("-")
            collection = find_collection(engine, name)
            if collection is None or collection.origin != origin:
                passed_over.append(folder)
                continue
            for key, blocks in sessions.items():
                rows = _rows(engine, collection, key, blocks)
                lonely = [each for each in blocks if _chunk_id(each) not in rows]
                old = [each.name for each in lonely if each.written <= before]
                living += len(blocks) - len(lonely)
                young += len(lonely) - len(old)
                orphans += len(old)
                if not dry_run:
                    objects.delete(old)
    return Swept(orphans, young, living, tuple(passed_over))


def purge(
    *,
    uri: str | None = None,
    token: str | None = None,
    database: str | None = None,
    timeout: float = 10.0,
    attempts: int = 5,
) -> list[str]:
    """Remove the rows of all sessions without a name; no process may be using one.

    Such a session ends with its process, which removes its rows unless it is killed. Rows do not tell which process
    they belong to, so all are removed; `sweep` then removes their objects from a lasting store.

    Parameters, and errors, are those of `sweep`. Returns the collections of memlong's that were purged.
    """
    done = []
    with _engine("purge", uri, token, database, timeout, attempts) as engine:
        for name in engine.call("list_collections"):
            try:
                collection = find_collection(engine, name)
            except InvalidArgumentError:  # not memlong's
                continue
            if collection is not None:
                engine.call("delete", name, filter=f"session >= {LEAST_UNNAMED}")
                done.append(name)
    return done


@contextmanager
def _engine(
    what: str, uri: str | None, token: str | None, database: str | None, timeout: float, attempts: int
) -> Iterator[Engine]:
    address = address_of(uri, token, database)
    if address is None:
        raise InvalidArgumentError(
            f"{what} needs the uri of the Milvus that has the rows: nothing else tells what is in use"
        )
    engine = Engine(address, timeout=timeout, attempts=attempts)
    try:
        yield engine
    finally:
        engine.close()


def _rows(engine: Engine, collection: Collection, key: str, blocks: list[StoredObject]) -> set[int | None]:
    """Return the ids of a session's rows."""
    ids = np.unique([i for i in map(_chunk_id, blocks) if i is not None]).astype(np.int64)
    return set(SessionRows(engine, collection, Session.of_key(key)).held(ids).tolist())


def _chunk_id(block: StoredObject) -> int | None:
    """Return whose object it is; None for one that was never finished."""
    parts = _BLOCK.fullmatch(block.name)
    return None if parts is None or parts["id"] is None else int(parts["id"])
