"""URIs as names of backends, and how to show them, and options, without what is secret in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SECRET = (
    "token",
    "password",
    "passwd",
    "pwd",
    "secret",
    "key",
    "auth",
    "credential",
    "credentials",
    "user",
    "username",
)
_USER = re.compile(r"(?<=://)[^/?#]*@")  # up to the last one before the path, for a password may hold another
_QUERY = re.compile(rf"(?i)(?<=[?&])([^=&#]*(?:{'|'.join(_SECRET)}))=[^&#]*")


def scheme_of(name: str) -> str | None:
    """Return the scheme of a URI such as ``"milvus://host"``, in lower case; None for a plain name."""
    scheme, colon, _ = name.partition("://")
    return scheme.lower() if colon else None


def without_credentials(uri: str) -> str:
    """Return a URI, or a plain name, with ``***`` for user and password and for secrets in its query."""
    return _QUERY.sub(r"\1=***", _USER.sub("***@", uri))


def hide_credentials(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with ``***`` for tokens, passwords and the like, and without those in URIs."""
    return {name: _hidden(name, value) for name, value in options.items()}


def _hidden(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return "***" if name.lower().endswith(_SECRET) else without_credentials(value)
    return value
