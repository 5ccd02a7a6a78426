"""Where a Milvus is: URIs as users write them, taken apart, and shown without their secrets."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from memlong.errors import InvalidArgumentError
from memlong.uri import without_credentials as redacted
from memlong_milvus.options import MilvusOptions

_SERVER_SCHEMES = ("http", "https", "tcp")
_NUMBER = re.compile(r"-?\d+")
_FORMS = (
    "milvus://host:19530/database?session=NAME&store=s3://bucket/folder, milvus+https://host/database, or "
    "milvus+lite:///folder/file.db"
)
_TEXTS = ("session", "collection", "store")
_OPTIONS = (*vars(MilvusOptions()), "store")


@dataclass(frozen=True)
class Address:
    """Where to connect to.

    Attributes
    ----------
    uri : str
        Without user and password: a local file for Milvus Lite, or http(s)://host:port.
    token : str
        What to sign in with, "user:password" or an API key; empty for nothing.
    database : str
        Empty for the default one.
    """

    uri: str
    token: str = field(default="", repr=False)
    database: str = ""

    @property
    def is_local(self) -> bool:
        """Whether it is a file, for Milvus Lite."""
        return "://" not in self.uri


def parse_address(uri: str, token: str | None = None, database: str | None = None) -> Address:
    """Take apart where a Milvus is.

    Parameters
    ----------
    uri : str
        A local file that ends in .db, or http[s]://[user:password@]host[:port][/database].
    token, database : str, optional
        Instead of what the URI says.

    Raises
    ------
    InvalidArgumentError
        If it is neither.
    """
    if "://" not in uri:
        if not uri.endswith(".db"):
            raise InvalidArgumentError(
                "uri must be the path of a file that ends in .db, for Milvus Lite, or http://host:19530, for a server, "
                f"got {redacted(uri)!r}"
            )
        return Address(uri, token or "", database or "")
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError:  # whose text may hold what is secret
        raise InvalidArgumentError(
            "uri must be of the form http://host:19530, with a number as port and a percent-encoded password, got "
            f"{redacted(uri)!r}"
        ) from None
    _check_encoded(uri, parts.netloc)
    if parts.scheme not in _SERVER_SCHEMES or not host:
        raise InvalidArgumentError(
            f"uri must be one of {', '.join(_SERVER_SCHEMES)} and a host, such as http://localhost:19530, or the path "
            f"of a file that ends in .db, got {redacted(uri)!r}"
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
        ``milvus+lite:///path/file.db[?…]`` for a local file. A value in it is percent-encoded where it must be.

    Raises
    ------
    InvalidArgumentError
        If it is of another form, or has an option that there is not.
    """
    try:
        parts = urlsplit(uri)
    except ValueError:  # whose text may hold what is secret
        raise InvalidArgumentError(f"{redacted(uri)!r} cannot be read; expected {_FORMS}") from None
    _check_encoded(uri, parts.netloc)
    kind = parts.scheme.removeprefix("milvus").removeprefix("+")
    if not parts.scheme.startswith("milvus") or kind not in ("", "http", "https", "lite"):
        raise InvalidArgumentError(f"{redacted(uri)!r} is no URI of a Milvus; expected {_FORMS}")
    options = _options(parts.query, uri)
    if kind == "lite":
        if parts.netloc or not parts.path.endswith(".db"):
            raise InvalidArgumentError(
                f"{redacted(uri)!r} names no local file that ends in .db; expected milvus+lite:///folder/file.db, with "
                "three slashes"
            )
        return "milvus", {"uri": unquote(parts.path), **options}
    if not parts.hostname:
        raise InvalidArgumentError(f"{redacted(uri)!r} names no host; expected {_FORMS}")
    address = parse_address(f"{kind or 'http'}://{parts.netloc}{parts.path}")
    found: dict[str, object] = {"uri": address.uri}
    if address.token:
        found["token"] = address.token
    if address.database:
        found["database"] = address.database
    return "milvus", {**found, **options}


def _options(query: str, uri: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _OPTIONS:
            raise InvalidArgumentError(
                f"{redacted(uri)!r} has an option {name!r} that there is not; there are: {', '.join(_OPTIONS)}"
            )
        if name in found:
            raise InvalidArgumentError(f"{redacted(uri)!r} gives {name!r} twice; give it once")
        found[name] = _plain(value) if name not in _TEXTS else value
    return found


def _check_encoded(uri: str, netloc: str) -> None:
    """A password with one of these would be cut in two, and a part of it be taken for a host or a path."""
    if "@" in uri.partition("://")[2].removeprefix(netloc):
        raise InvalidArgumentError(
            f"{redacted(uri)!r} has an '@' after the host; where a password holds '/', '?' or '#', write %2F, %3F or "
            "%23, and %40 for '@' elsewhere"
        )


def _plain(value: str) -> object:
    if value in ("true", "false"):
        return value == "true"
    if _NUMBER.fullmatch(value):
        return int(value)
    try:
        return float(value)
    except ValueError:
        return value
