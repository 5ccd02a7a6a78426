"""Errors of pymilvus: which are worth another attempt, what to tell the user, and what not to log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import grpc
from pymilvus import MilvusException

from memlong.uri import without_credentials
from memlong_milvus.errors import BackendError
from memlong_milvus.uri import Address

_PASSING_CODES = {2, 4, 8, 101, 103, 503, 901, 902}
"""Codes of Milvus (pkg/util/merr) for a service, node, replica or collection that will soon be ready."""
_PASSING = (
    "not ready",
    "unavailable",
    "not loaded",
    "offline",
    "no available",
    "retry timeout",
    "run out of",
)
_PASSING_RPC = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_DENIED = ("auth check failure", "unauthenticated", "permission", "password", "privilege")
_DENIED_RPC = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)

_CALLING: ContextVar[bool] = ContextVar("memlong_milvus_calling", default=False)
_LOGGERS = (
    *("pymilvus.decorators", "pymilvus.client.connection_manager", "pymilvus.client.grpc_handler"),
    "stamina",
)


@contextmanager
def quietly() -> Iterator[None]:
    """Drop what these libraries log of this thread's calls, a traceback an attempt: the last error is raised."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_of_others)  # a second time does nothing
    token = _CALLING.set(True)
    try:
        yield
    finally:
        _CALLING.reset(token)


def _is_of_others(_: logging.LogRecord) -> bool:
    return not _CALLING.get()


def is_denied(error: BaseException) -> bool:
    """Whether Milvus denied access."""
    return any(
        any(word in _text(each).lower() for word in _DENIED)
        or (isinstance(each, grpc.RpcError) and each.code() in _DENIED_RPC)
        for each in _chain(error)
    )


def is_passing(error: BaseException) -> bool:
    """Whether the same request may soon succeed: nobody there yet, overload, a deadline."""
    if isinstance(error, grpc.FutureTimeoutError):
        return True
    for each in (error, error.__cause__):
        if isinstance(each, grpc.RpcError) and each.code() in _PASSING_RPC:
            return not is_denied(error)
    if not isinstance(error, MilvusException) or is_denied(error):
        return False
    text = _text(error).lower()
    return error.retriable or error.code in _PASSING_CODES or any(word in text for word in _PASSING)


def explained(what: str, error: BaseException, address: Address, attempts: int) -> BackendError:
    """Return the error to raise, without secrets, for one of pymilvus after so many attempts to do ``what``."""
    denied = is_denied(error)
    reason = without_credentials(_text(_chain(error)[-1] if denied else error))
    for secret in (address.token, address.token.partition(":")[2]):
        reason = reason.replace(secret, "***") if secret else reason
    if denied:
        return BackendError(
            f"Milvus at {address.uri} refused to {what}: {reason}. Give the user and password of an account that may, "
            "as token='user:password', in the URI, or in the environment as MEMLONG_MILVUS_TOKEN"
        )
    if is_passing(error):
        where = "the local file" if address.is_local else "the server"
        return BackendError(
            f"Milvus at {address.uri} did not {what} in {attempts} attempts: {reason}. Is {where} there, and can it be "
            "reached? attempts and timeout say how long to try; the bank is as it was"
        )
    if address.is_local and "open local milvus" in reason.lower():
        return BackendError(
            f"Milvus Lite cannot open {address.uri!r}; its log says why. Is another process using the file? Only one "
            "can at a time; a server takes many"
        )
    return BackendError(f"Milvus at {address.uri} could not {what}: {reason}")


def without_frames(error: BaseException) -> None:
    """Drop the frames of an error and of what led to it: they hold the error again, and the bank that had it."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            left += (each.__cause__, each.__context__)


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and its causes; pymilvus itself says of denied access only that it could not connect."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and cause not in found:
        found.append(cause)
    return found


def _text(error: BaseException) -> str:
    text = error.message if isinstance(error, MilvusException) else ""
    if not text and isinstance(error, grpc.RpcError):
        text = f"{error.code().name}: {error.details()}"
    return str(text) or str(error) or type(error).__name__
