"""purge: remove the rows of sessions without a name that killed processes have left on a server."""

from __future__ import annotations

from memlong.errors import InvalidArgumentError
from memlong_milvus.collection import find_collection
from memlong_milvus.engine import Engine
from memlong_milvus.hub import HUBS
from memlong_milvus.place import address_of
from memlong_milvus.sessions import LEAST_UNNAMED


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

    Parameters
    ----------
    uri, token, database, timeout, attempts
        As `MilvusBank` takes them.

    Returns
    -------
    list of str
        The collections of memlong's that were gone through.

    Raises
    ------
    InvalidArgumentError
        If there is no uri.
    BackendError
        If Milvus does not answer.
    """
    address = address_of(uri, token, database)
    if address is None:
        raise InvalidArgumentError("purge needs the uri of the Milvus that has the rows")
    engine = Engine(HUBS.at(address), timeout=timeout, attempts=attempts)
    try:
        done = []
        for name in engine.call("list_collections"):
            try:
                collection = find_collection(engine, name)
            except InvalidArgumentError:  # somebody else's
                continue
            if collection is not None:
                engine.call("delete", name, filter=f"session >= {LEAST_UNNAMED}")
                done.append(name)
        return done
    finally:
        engine.close()
