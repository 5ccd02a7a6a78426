"""URIs as names of backends, and redaction of secrets in URIs and options.

Only what is known to be harmless is shown; anything else may be a secret, whatever its name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from memlong.errors import HIDDEN, InvalidArgumentError

_HARMLESS = frozenset(
    (  # noqa: SIM905 - a list would take a line per name
        "M attempts build_threads candidates chunk_prompt collection compression connectivity consistency database db "
        "device dim disk disk_budget dtype ef ef_construction ef_search endpoint eviction expansion_add "
        "expansion_search folder host hosts index initial_capacity kv_device max_bytes max_chunks metric mode model "
        "name nprobe objects pairs partitions path piece_tokens port query_prompt readers recency recency_scale "
        "refine region resume retrievers retries seed session sharpness staleness store timeout tls train_size uri url "
        "weights"
    ).split()
)
"""Names of options whose values may be shown; secrets in URIs are still redacted."""

_PORTS = {80, 443, 5432, 6333, 6334, 6379, 8000, 8080, 8443, 9000, 9091, 9200, 19530, 19531}
"""Ports that may be shown: any other number may be a password, as in ``db://me:12345`` without its host."""

_SECRET = re.compile(
    r"(?i)pass|pwd|pin|secret|token|key|auth|cred|user|login|account|dsn|conn|jwt|sig|cert|cookie|session_?id|otp|salt"
)
_URI = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*)://([^\s'\"<>]*)")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/?/?)(.*)", re.DOTALL)  # longer than a drive's letter
_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[\w.,-]*)(?::(?P<port>[0-9]{1,5}))?")


def scheme_of(name: str) -> str | None:
    """Return the scheme of a URI such as ``"milvus://host"``, in lowercase; None for a plain name or a non-string."""
    if not isinstance(name, str):
        return None
    scheme, colon, _ = name.partition("://")
    return scheme.lower() if colon else None


def local_path(place: str) -> str | None:
    """Return the local path that a place stands for: a path itself, or that of a file URI; None for any other URI.

    Raises
    ------
    InvalidArgumentError
        If it is a URI with one slash, or a file URI of another machine or of a relative path.
    """
    found = _SCHEME.match(place)
    scheme, slashes, rest = (found[1].lower(), found[2], found[3]) if found else ("", "", place)
    if not slashes and scheme != "file":
        return None if "://" in place else place  # such as simplecache::s3://bucket
    if scheme == "file":
        path = rest.removeprefix("localhost") if slashes == "//" else slashes + rest
        if not path.startswith("/") or path == "/":
            raise InvalidArgumentError(
                "a file URI must have an absolute path, such as file:///data/kv, got "
                f"{without_credentials(place)!r}: add the missing slash, or give the path without 'file:'"
            )
        from urllib.request import url2pathname  # slow to import

        return url2pathname(path)
    if slashes == "/":
        raise InvalidArgumentError(
            f"a URI must have two slashes after its scheme, got {without_credentials(place)!r}: write {scheme}://, and "
            "as text, as a Path joins slashes"
        )
    return None


def without_credentials(text: str) -> str:
    """Replace possible secrets with ``***`` in a URI, a name, or a text that contains URIs."""
    scheme, colon, rest = text.partition("://")
    if not colon:
        before, at, after = text.rpartition("@")
        return f"{HIDDEN}@{after}" if at and ":" in before else text
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) and not re.search(r"\s", text):
        return f"{scheme}://{_shown_rest(rest)}"
    return _URI.sub(_shown_uri, text)


def scrubbed(text: str, uri: str) -> str:
    """Remove a URI's secrets from a text about it, such as an error message, wherever they occur."""
    text = text.replace(uri, without_credentials(uri))
    user, _, rest = uri.partition("://")[2].rpartition("@")
    pairs = [pair.partition("=") for pair in rest.partition("?")[2].split("&")]
    values = [value for name, _, value in pairs if name not in _HARMLESS]
    found = {
        part for each in (user, user.partition(":")[2], *values) for part in (each, unquote(each)) if part
    }
    for secret in sorted(found, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def hide_credentials(options: Mapping[str, Any]) -> dict[str, Any]:
    """Replace possible secrets in options with ``***``, including in nested lists and dictionaries."""
    return {name: _hidden(str(name), value) for name, value in options.items()}


def digested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Like `hide_credentials`, but hash hidden values whose names do not suggest a secret."""
    hidden = hide_credentials(options)
    return {
        name: hashlib.sha256(repr(options[name]).encode()).hexdigest()[:16]
        if value == HIDDEN and not _SECRET.search(str(name))
        else value
        for name, value in hidden.items()
    }


def _hidden(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return {inner: _hidden(f"{name}.{inner}", each) for inner, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_hidden(name, each) for each in value]
    parts = name.split(".")
    if parts[-1] in _HARMLESS and not any(_SECRET.search(each) for each in parts[:-1]):
        return without_credentials(value) if isinstance(value, str) else value
    is_number = isinstance(value, int | float)
    return value if is_number and not any(map(_SECRET.search, parts)) else HIDDEN


def _shown_uri(found: re.Match[str]) -> str:
    bare = found[2].rstrip(".,;:!)]}")  # trailing punctuation belongs to the sentence
    return f"{found[1]}://{_shown_rest(bare)}{found[2][len(bare) :]}"


def _shown_rest(rest: str) -> str:
    """Redact what follows ``://``: keep host, known port, path and harmless options."""
    _, at, rest = rest.rpartition("@")  # the last "@", as a password may contain "@", "/", "?" and "#"
    rest, mark, _ = rest.partition("#")
    rest, question, query = rest.partition("?")
    host, slash, path = rest.partition("/")
    shown = f"{HIDDEN}@" if at else ""
    shown += _shown_host(host) + slash + path
    if question:
        shown += "?" + "&".join(map(_shown_pair, query.split("&")))
    return shown + (f"#{HIDDEN}" if mark else "")


def _shown_host(host: str) -> str:
    found = _HOST.fullmatch(host)
    if found is None:
        return HIDDEN
    port = found["port"]
    return found["host"] + ("" if port is None else f":{port if int(port) in _PORTS else HIDDEN}")


def _shown_pair(pair: str) -> str:
    name, equals, value = pair.partition("=")
    if not equals:
        return HIDDEN
    return f"{name}={without_credentials(value) if name in _HARMLESS else HIDDEN}"
