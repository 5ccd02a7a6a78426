"""The exceptions that memlong raises. Every message says what is wrong, why it matters and how to fix it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = [
    "DeviceUnavailableError",
    "InvalidArgumentError",
    "InvalidTextError",
    "LostChunksError",
    "LostChunksWarning",
    "MemlongError",
    "MissingDependencyError",
    "OtherBasesError",
    "PluginError",
    "SnapshotError",
    "StorageError",
    "UnknownNameError",
    "UnsupportedModelError",
]


HIDDEN = "***"
"""Replaces possible secrets in messages and files."""


_LONGEST = 8000


class MemlongError(Exception):
    """Base class of all errors that memlong raises on purpose."""

    def __str__(self) -> str:
        """Return the message, truncated if very long and with control characters escaped, as it may quote any input."""
        text = super().__str__()
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
        return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)


class InvalidArgumentError(MemlongError, ValueError):
    """An argument has an invalid value; nothing was changed."""


class OtherBasesError(InvalidArgumentError):
    """A session was begun over other bases than those that are given.

    Attributes
    ----------
    bases : tuple of str
        `MemoryBank.identity` of each base that it was begun over.
    """

    def __init__(self, session_id: str, bases: Sequence[str]) -> None:
        self.bases = tuple(bases)
        super().__init__(
            f"session {session_id!r} lies over {len(bases)} bases, and those given are others: pass the same banks "
            "each time"
        )


class UnknownNameError(InvalidArgumentError):
    """No backend, retriever or eviction policy has the requested name."""


class MissingDependencyError(MemlongError, ImportError):
    """A required library is not installed or cannot be imported."""


class PluginError(MemlongError):
    """A plugin failed to load, or two plugins claim the same name."""


class UnsupportedModelError(MemlongError):
    """Memory cannot be attached to this model."""


class InvalidTextError(InvalidArgumentError):
    """A text is missing, empty, binary or too short."""


class DeviceUnavailableError(MemlongError, RuntimeError):
    """The requested device is not available."""


class StorageError(MemlongError, OSError):
    """A storage location cannot be read or written."""


class SnapshotError(StorageError):
    """A snapshot cannot be read or written, is damaged, or belongs to something else; existing files are unchanged."""


class LostChunksError(StorageError):
    """K-V blocks are missing from a store or damaged.

    Attributes
    ----------
    reasons : dict of int to str
        The reason, by chunk id.
    """

    def __init__(self, reasons: Mapping[int, str]) -> None:
        self.reasons = dict(reasons)
        first = [f"chunk {chunk_id} ({reason})" for chunk_id, reason in list(self.reasons.items())[:3]]
        more = len(self.reasons) - len(first)
        named = ", ".join(first) + (f" and {more} more" if more else "")
        super().__init__(f"The keys and values of {named} are lost")


class LostChunksWarning(UserWarning):
    """Chunks were removed from a bank because their keys and values were lost."""
