"""sweep: remove the objects of chunks that Milvus does not hold."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from memlong.bank import Objects, StoredObject, objects_at
from memlong.errors import InvalidArgumentError
from memlong_milvus.collection import Collection, find_collection
from memlong_milvus.engine import Engine
from memlong_milvus.hub import HUBS
from memlong_milvus.place import address_of
from memlong_milvus.rows import SessionRows
from memlong_milvus.sessions import Session

_BLOCK = re.compile(
    r"(?P<collection>[^/]+)-(?P<origin>[0-9a-f]+)/(?P<key>[0-9a-f]{32})/((?P<id>0|[1-9][0-9]{0,17})\.kv|0[0-9]{1,17}\.kv|\.[0-9]+\.kv\.[0-9]+\.part)"
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
    address = address_of(uri, token, database)
    if address is None:
        raise InvalidArgumentError(
            "sweep needs the uri of the Milvus that has the rows; without it, all are orphans"
        )
    objects = objects_at(store)
    before = time.time() - grace
    listed = _by_session(objects.list())  # first: a row that comes later is not missed
    engine = Engine(HUBS.at(address), timeout=timeout, attempts=attempts)
    try:
        return _swept(engine, objects, listed, before, dry_run=dry_run)
    finally:
        engine.close()


def _swept(
    engine: Engine,
    objects: Objects,
    listed: dict[tuple[str, str], dict[str, list[StoredObject]]],
    before: float,
    *,
    dry_run: bool,
) -> Swept:
    orphans = young = living = 0
    passed_over = []
    for (name, origin), sessions in listed.items():
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


def _by_session(listed: list[StoredObject]) -> dict[tuple[str, str], dict[str, list[StoredObject]]]:
    found: dict[tuple[str, str], dict[str, list[StoredObject]]] = defaultdict(lambda: defaultdict(list))
    for each in listed:
        parts = _BLOCK.fullmatch(each.name)
        if parts:
            found[parts["collection"], parts["origin"]][parts["key"]].append(each)
    return found


def _living(engine: Engine, collection: Collection, key: str, blocks: list[StoredObject]) -> set[int]:
    """Return the ids of a session's rows, of those that there are objects of."""
    ids = np.unique([i for i in map(_chunk_id, blocks) if i is not None])
    rows = SessionRows(engine, collection, Session.of_key(key))
    return set(rows.among(ids.astype(np.int64)).tolist())


def _chunk_id(block: StoredObject) -> int | None:
    """Return whose object it is; None for what was never finished."""
    parts = _BLOCK.fullmatch(block.name)
    return None if parts is None or parts["id"] is None else int(parts["id"])
