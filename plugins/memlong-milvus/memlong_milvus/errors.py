"""What can go wrong with a Milvus and with the objects beside it."""

from __future__ import annotations

from memlong.errors import StorageError


class BackendError(StorageError):
    """Milvus did not do what it was asked; the message says what, why and how to fix it, and names no secret."""


class LostBlocksError(StorageError):
    """The keys and values of chunks are not in the store any more, or are damaged.

    Attributes
    ----------
    reasons : dict of int to str
        What is wrong, by chunk id.
    """

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(f"the keys and values of {named(reasons)} cannot be read")
        self.reasons = dict(reasons)


class LostBlocksWarning(UserWarning):
    """Chunks have left a bank because their keys and values were lost."""


def named(reasons: dict[int, str]) -> str:
    """Return text that names chunks with what is wrong with them, the first few of many."""
    first = [f"chunk {chunk_id} ({reason})" for chunk_id, reason in list(reasons.items())[:3]]
    more = len(reasons) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")
