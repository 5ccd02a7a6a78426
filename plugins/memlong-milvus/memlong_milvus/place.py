"""Where a bank's rows and its keys and values go, by what its user said and by what the environment has."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import weakref
from pathlib import Path

from memlong.bank import Objects, objects_at
from memlong.bank.forks import unless_forked
from memlong.errors import InvalidArgumentError
from memlong_milvus.sessions import Session
from memlong_milvus.uri import Address, parse_address

URI_VARIABLE, TOKEN_VARIABLE = "MEMLONG_MILVUS_URI", "MEMLONG_MILVUS_TOKEN"


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


def objects_of(store: str | None, address: Address | None, session: Session) -> Objects:
    """Return where the keys and values of a session go.

    Raises
    ------
    InvalidArgumentError
        If a session that is to last would have them in a temporary folder, or ``store`` names no place.
    """
    if store is not None:
        if not isinstance(store, str) or not store:
            raise InvalidArgumentError(
                f"store must be a folder, a URI or a KeyValueStore, got {store!r} of type {type(store).__name__}"
            )
        return objects_at(store, synced=session.named)
    if not session.named:
        folder = Path(tempfile.gettempdir(), f"memlong-milvus-kv-{secrets.token_hex(8)}")
        objects = objects_at(folder, synced=False)
        weakref.finalize(objects, unless_forked(shutil.rmtree, folder, ignore_errors=True))
        return objects
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
    return objects_at(Path(address.uri).with_suffix(".kv"))
