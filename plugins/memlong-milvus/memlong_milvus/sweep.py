"""What an operator runs: sweep removes objects that no row refers to, purge the rows of sessions without a name."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from memlong.bank import Objects, StoredObject, objects_at
from memlong.errors import InvalidArgumentError
from memlong_milvus.collection import Collection, find_collection
from memlong_milvus.engine import Engine
from memlong_milvus.hub import HUBS
from memlong_milvus.place import address_of
from memlong_milvus.rows import SessionRows
from memlong_milvus.sessions import LEAST_UNNAMED, Session

_BLOCK = re.compile(
    r"(?P<collection>[^/]+)-(?P<origin>[0-9a-f]+)/(?P<key>[0-9a-f]{32})/"
    r"((?P<id>0|[1-9][0-9]{0,17})\.kv|0[0-9]{1,17}\.kv|\.[0-9]+\.kv\.[0-9]+\.part)"
)


@dataclass(frozen=True)
class Swept:
    """What a sweep found.

    Attributes
    ----------
    orphans : int
        Objects of chunks without a row, old enough; removed, unless it was only to look.
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
        Seconds that an object without a row is left alone, by the clock of the place where it is. One whose age that
        place does not tell stays.
    dry_run : bool, default False
        Count only.

    Returns
    -------
    Swept
        What was found.

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
        for (name, origin), sessions in _by_session(objects).items():
            collection = find_collection(engine, name)
            if collection is None or collection.origin != origin:
                passed_over.append(f"{name}-{origin}")
                continue
            found = {key: _living(engine, collection, key, blocks) for key, blocks in sessions.items()}
            for key, blocks in sessions.items():
                lonely = [each for each in blocks if _chunk_id(each) not in found[key]]
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
    """Remove the rows of all sessions without a name, while no process is at work with one.

    Such a session ends with its process, which removes its rows unless it is killed. Whose rows are left nobody can
    tell, so all are removed; their objects, where they lie in a store that stays, are orphans for `sweep` then.

    Parameters, and errors, are those of `sweep`. Returns the collections of memlong's that were gone through.
    """
    done = []
    with _engine("purge", uri, token, database, timeout, attempts) as engine:
        for name in engine.call("list_collections"):
            try:
                collection = find_collection(engine, name)
            except InvalidArgumentError:  # somebody else's
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
            f"{what} needs the uri of the Milvus that has the rows; without it, nobody can tell what is in use"
        )
    engine = Engine(HUBS.at(address), timeout=timeout, attempts=attempts)
    try:
        yield engine
    finally:
        engine.close()


def _by_session(objects: Objects) -> dict[tuple[str, str], dict[str, list[StoredObject]]]:
    """Return what is listed before any row is asked for, by collection and session: a row that comes later counts."""
    found: dict[tuple[str, str], dict[str, list[StoredObject]]] = defaultdict(lambda: defaultdict(list))
    for each in objects.list():
        parts = _BLOCK.fullmatch(each.name)
        if parts:
            found[parts["collection"], parts["origin"]][parts["key"]].append(each)
    return found


def _living(engine: Engine, collection: Collection, key: str, blocks: list[StoredObject]) -> set[int | None]:
    """Return the ids of a session's rows, of those that there are objects of."""
    ids = np.unique([i for i in map(_chunk_id, blocks) if i is not None]).astype(np.int64)
    return set(SessionRows(engine, collection, Session.of_key(key)).among(ids).tolist())


def _chunk_id(block: StoredObject) -> int | None:
    """Return whose object it is; None for what was never finished."""
    parts = _BLOCK.fullmatch(block.name)
    return None if parts is None or parts["id"] is None else int(parts["id"])
