"""The errors of Milvus and of its objects."""

from __future__ import annotations

from memlong.errors import StorageError


class BackendError(StorageError):
    """Milvus did not do what it was asked; the message says what, why and how to fix it, and names no secret."""
