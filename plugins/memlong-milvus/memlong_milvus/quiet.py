"""Keep libraries from logging a traceback for every attempt: the last error is raised, with all that it says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_OURS: ContextVar[bool] = ContextVar("memlong_milvus_calling", default=False)
_LOGGERS = (
    "pymilvus.decorators",
    "pymilvus.client.connection_manager",
    "pymilvus.client.grpc_handler",
    "stamina",
)


@contextmanager
def quietly() -> Iterator[None]:
    """Let through nothing that these libraries log in this thread meanwhile; what others' calls log stays."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_not_ours)  # once: a second time does nothing
    token = _OURS.set(True)
    try:
        yield
    finally:
        _OURS.reset(token)


def _not_ours(_: logging.LogRecord) -> bool:
    return not _OURS.get()
