"""Where a bank's rows, keys and values go: by its arguments, by a milvus:// URI, or by the environment."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from memlong.bank import Objects, objects_at
from memlong.bank.forks import unless_forked
from memlong.errors import InvalidArgumentError
from memlong.uri import without_credentials
from memlong_milvus.options import MilvusOptions
from memlong_milvus.sessions import Session

_SERVER_SCHEMES = ("http", "https", "tcp")
_FORMS = (
    "milvus://host:19530/database?session=NAME&store=s3://bucket/folder, milvus+https://host/database, or "
    "milvus+lite:///folder/file.db"
)
_KINDS = {"milvus": "http", "milvus+http": "http", "milvus+https": "https", "milvus+lite": "lite"}
_TEXTS = ("session", "collection", "store")
_OPTIONS = (*vars(MilvusOptions()), "store")


@dataclass(frozen=True)
class Address:
    """Where to connect to; empty strings are no token, and the default database."""

    uri: str
    """Without user and password: a local file for Milvus Lite, or http(s)://host:port."""
    token: str = field(default="", repr=False)
    database: str = ""

    @property
    def is_local(self) -> bool:
        """Whether it is a file, for Milvus Lite."""
        return "://" not in self.uri


def address_of(uri: str | None, token: str | None, database: str | None) -> Address | None:
    """Return where Milvus is, by the arguments or the environment; None if neither says."""
    for name, value in (("uri", uri), ("token", token), ("database", database)):
        if value is not None and not isinstance(value, str):
            raise InvalidArgumentError(f"{name} must be text, got {type(value).__name__}")
    uri = uri or os.environ.get("MEMLONG_MILVUS_URI")
    return parse_address(uri, token or os.environ.get("MEMLONG_MILVUS_TOKEN"), database) if uri else None


def parse_address(uri: str, token: str | None = None, database: str | None = None) -> Address:
    """Parse a URI: a local file that ends in .db, or http[s]://[user:password@]host[:port][/database].

    ``token`` and ``database`` take precedence. InvalidArgumentError for another form.
    """
    shown = without_credentials(uri)
    if "://" not in uri:
        if not uri.endswith(".db"):
            raise InvalidArgumentError(
                "uri must be the path of a file that ends in .db, for Milvus Lite, or http://host:19530, for a server, "
                f"got {shown!r}"
            )
        return Address(uri, token or "", database or "")
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError:  # whose text may hold secrets
        raise InvalidArgumentError(
            "uri must be of the form http://host:19530, with a number as port and a percent-encoded password, got "
            f"{shown!r}"
        ) from None
    if "@" in uri.partition("://")[2].removeprefix(parts.netloc):  # a password was cut in two
        raise InvalidArgumentError(
            f"{shown!r} has an '@' after the host; in a password, write %2F, %3F or %23 for '/', '?' or '#', and %40 "
            "for '@' elsewhere"
        )
    if parts.scheme not in _SERVER_SCHEMES or not host:
        raise InvalidArgumentError(
            f"uri must be one of {', '.join(_SERVER_SCHEMES)} and a host, such as http://localhost:19530, or the path "
            f"of a file that ends in .db, got {shown!r}"
        )
    given = ":".join(unquote(each) for each in (parts.username, parts.password) if each is not None)
    bare = f"{parts.scheme}://{f'[{host}]' if ':' in host else host}" + (f":{port}" if port else "")
    return Address(bare, token or given, database or unquote(parts.path.strip("/")))


def resolve(uri: str) -> tuple[str, dict[str, object]]:
    """Turn a milvus:// URI into the name of the backend and its options.

    Parameters
    ----------
    uri : str
        ``milvus://[user:password@]host[:port][/database][?option=value&…]``, ``milvus+https://…`` for TLS, or
        ``milvus+lite:///path/file.db[?…]`` for a local file. Percent-encode values where necessary.

    Raises
    ------
    InvalidArgumentError
        If it has another form, or an unknown option.
    """
    shown = without_credentials(uri)
    scheme, _, rest = uri.partition("://")
    kind = _KINDS.get(scheme.lower())
    if kind is None:
        raise InvalidArgumentError(f"{shown!r} is no URI of a Milvus; expected {_FORMS}")
    place, _, query = rest.partition("?")
    if kind == "lite":
        if not place.startswith("/") or not place.endswith(".db"):
            raise InvalidArgumentError(
                f"{shown!r} names no local file that ends in .db; expected milvus+lite:///folder/file.db, with three "
                "slashes"
            )
        return "milvus", {"uri": unquote(place), **_options(query, shown)}
    if not place.partition("/")[0]:
        raise InvalidArgumentError(f"{shown!r} names no host; expected {_FORMS}")
    address = parse_address(f"{kind}://{rest}")
    known = {"uri": address.uri, "token": address.token, "database": address.database}
    return "milvus", {**{name: value for name, value in known.items() if value}, **_options(query, shown)}


def _options(query: str, shown: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _OPTIONS:
            raise InvalidArgumentError(
                f"{shown!r} has an option {name!r} that does not exist; there are: {', '.join(_OPTIONS)}"
            )
        if name in found:
            raise InvalidArgumentError(f"{shown!r} gives {name!r} twice; give it once")
        found[name] = value if name in _TEXTS else _plain(value)
    return found


def _plain(value: str) -> object:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def objects_of(store: str | None, address: Address | None, session: Session) -> Objects:
    """Return where the keys and values of a session go; InvalidArgumentError if they would go before the session."""
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
