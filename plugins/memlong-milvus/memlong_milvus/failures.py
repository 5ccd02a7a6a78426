"""What an error of pymilvus means: worth another try or not, and what to tell the user."""

from __future__ import annotations

import grpc
from pymilvus import MilvusException

from memlong.uri import without_credentials
from memlong_milvus.errors import BackendError
from memlong_milvus.uri import Address

_NOT_READY = {1, 2, 4, 8, 101, 103, 503, 901, 902}
"""Codes of Milvus (pkg/util/merr) for a service, node, replica or collection that is about to be there."""
_PASSING = (
    "not ready",
    "unavailable",
    "not loaded",
    "offline",
    "no available",
    "retry timeout",
    "run out of",
)
_DENIED = ("auth check failure", "unauthenticated", "permission", "password", "privilege")
_DENIED_CODES = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_PASSING_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def is_denied(error: BaseException) -> bool:
    """Whether Milvus refused whoever asks."""
    return any(
        any(word in _text(each).lower() for word in _DENIED)
        or (isinstance(each, grpc.RpcError) and each.code() in _DENIED_CODES)
        for each in _chain(error)
    )


def is_passing(error: BaseException) -> bool:
    """Whether the same request may well succeed in a moment: nobody there yet, overload, a deadline."""
    if isinstance(error, grpc.FutureTimeoutError):
        return True
    if isinstance(error, grpc.RpcError):
        return error.code() in _PASSING_CODES
    if not isinstance(error, MilvusException) or is_denied(error):
        return False
    cause = error.__cause__
    if isinstance(cause, grpc.RpcError) and cause.code() in _PASSING_CODES:
        return True
    words = _text(error).lower()
    return error.retriable or error.code in _NOT_READY - {1} or any(word in words for word in _PASSING)


def explained(what: str, error: BaseException, address: Address, attempts: int) -> BackendError:
    """Return the error to raise for one of pymilvus; no secret is in it.

    Parameters
    ----------
    what : str
        What was to be done, such as "search".
    error : BaseException
        What pymilvus raised.
    address : Address
        Whom it was asked of.
    attempts : int
        How often.
    """
    denied = is_denied(error)
    told = _chain(error)[-1] if denied else error
    reason = _without(address.token, without_credentials(_text(told)))
    if denied:
        return BackendError(
            f"Milvus at {address.uri} refused to {what}: {reason}. Give a user and a password that may, as "
            "token='user:password', in the URI, or in the environment as MEMLONG_MILVUS_TOKEN"
        )
    if is_passing(error):
        where = "the local file" if address.is_local else "the server"
        return BackendError(
            f"Milvus at {address.uri} did not {what} in {attempts} attempts: {reason}. Is {where} there, and may it be "
            "reached? attempts and timeout say how long to try; what is in the bank is as it was"
        )
    if address.is_local and "open local milvus" in reason.lower():
        return BackendError(
            f"Milvus Lite cannot open {address.uri!r}; what it logged says why. Has another process the file? It "
            "lets one at a time have it, where a server takes many"
        )
    return BackendError(f"Milvus at {address.uri} could not {what}: {reason}")


def without_frames(error: BaseException) -> None:
    """Take the frames from an error and what led to it: they hold the error again, and the bank that had it."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            left += (each.__cause__, each.__context__)


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and what led to it; pymilvus says of a refusal only that it could not connect."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and cause not in found:
        found.append(cause)
    return found


def _text(error: BaseException) -> str:
    text = error.message if isinstance(error, MilvusException) else ""
    if not text and isinstance(error, grpc.RpcError):
        text = f"{error.code().name}: {error.details()}"
    return str(text) or str(error) or type(error).__name__


def _without(token: str, text: str) -> str:
    for secret in (token, token.partition(":")[2]):
        if secret:
            text = text.replace(secret, "***")
    return text
