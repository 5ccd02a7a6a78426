"""Where a bank's rows and its keys and values go, by what its user said and by what the environment has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from memlong.bank import KeyValueStore
from memlong.errors import InvalidArgumentError
from memlong_milvus.objects import Objects, TemporaryObjects, objects_at
from memlong_milvus.sessions import Session
from memlong_milvus.uri import Address, parse_address

URI_VARIABLE, TOKEN_VARIABLE = "MEMLONG_MILVUS_URI", "MEMLONG_MILVUS_TOKEN"


@dataclass(frozen=True)
class Place:
    """Where a bank keeps what it holds.

    Attributes
    ----------
    address : Address or None
        Of Milvus; None is Milvus Lite on a file that goes when the process does.
    objects : Objects
        Where keys and values go, if there is no `store`.
    store : KeyValueStore or None
        What the user gave instead.
    """

    address: Address | None
    objects: Objects
    store: KeyValueStore | None


def find_place(
    uri: str | None,
    token: str | None,
    database: str | None,
    store: str | KeyValueStore | None,
    session: Session,
) -> Place:
    """Return where a bank keeps what it holds; the arguments are options of `MilvusBank`.

    Raises
    ------
    InvalidArgumentError
        If an argument cannot be used, or a session that is to last would have its keys and values in a temporary
        folder.
    """
    address = address_of(uri, token, database)
    if isinstance(store, KeyValueStore):
        return Place(address, TemporaryObjects(), store)
    if store is not None and (not isinstance(store, str) or not store):
        raise InvalidArgumentError(
            f"store must be a folder, a URI or a KeyValueStore, got {store!r} of type {type(store).__name__}"
        )
    return Place(address, _objects(store, address, session), None)


def address_of(uri: str | None, token: str | None, database: str | None) -> Address | None:
    """Return where Milvus is, by what was said or by the environment; None if neither says anything.

    Raises
    ------
    InvalidArgumentError
        If an argument cannot be used.
    """
    for name, value in (("uri", uri), ("token", token), ("database", database)):
        if value is not None and not isinstance(value, str):
            raise InvalidArgumentError(f"{name} must be text, got {type(value).__name__}")
    uri = uri or os.environ.get(URI_VARIABLE) or None
    token = token or os.environ.get(TOKEN_VARIABLE) or None
    return None if uri is None else parse_address(uri, token, database)


def _objects(store: str | None, address: Address | None, session: Session) -> Objects:
    if store is not None:
        return objects_at(store, synced=session.named)
    if not session.named:
        return TemporaryObjects()
    if address is None:
        raise InvalidArgumentError(
            f"the session {session.name!r} is to last, but without uri all is in a file that goes when the process "
            "does: give uri='/a/folder/memory.db', or http://… of a server"
        )
    if not address.is_local:
        raise InvalidArgumentError(
            f"the session {session.name!r} on {address.uri} lasts, so its keys and values must, too: say where, as "
            "store='/a/folder' or store='s3://bucket/folder'"
        )
    return objects_at(str(Path(address.uri).with_suffix(".kv")))
