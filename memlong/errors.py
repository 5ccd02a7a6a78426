"""The errors that memlong raises; every message says what is wrong, why it matters and how to fix it."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "DeviceUnavailableError",
    "InvalidArgumentError",
    "InvalidTextError",
    "LostChunksError",
    "LostChunksWarning",
    "MemlongError",
    "MissingDependencyError",
    "PluginError",
    "SnapshotError",
    "StorageError",
    "UnknownNameError",
    "UnsupportedModelError",
]


HIDDEN = "***"
"""What stands in messages and files instead of what may be secret."""


_LONGEST = 8000


class MemlongError(Exception):
    """Base of every error that memlong raises on purpose."""

    def __str__(self) -> str:
        """The message as text, whatever names and values it quotes: bounded, and without what a terminal would obey."""
        said = super().__str__()
        if len(said) > _LONGEST:
            said = f"{said[: _LONGEST // 2]} ... {said[-_LONGEST // 2 :]}"
        return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in said)


class InvalidArgumentError(MemlongError, ValueError):
    """An argument has a value that cannot be used; nothing was changed."""


class UnknownNameError(InvalidArgumentError):
    """No backend, retriever or eviction policy has the name that was asked for."""


class MissingDependencyError(MemlongError, ImportError):
    """A library that was asked for is not installed or does not load here."""


class PluginError(MemlongError):
    """A plugin did not load, or two plugins claim one name."""


class UnsupportedModelError(MemlongError):
    """The model is not one that memory can be attached to."""


class InvalidTextError(InvalidArgumentError):
    """A text is missing, empty, binary or too short for what was asked."""


class DeviceUnavailableError(MemlongError, RuntimeError):
    """A device that was asked for is not there."""


class StorageError(MemlongError, OSError):
    """A place where memory is kept cannot be written or read."""


class SnapshotError(StorageError):
    """A snapshot cannot be written or read, is damaged, or is of something else; what was there before still is."""


class LostChunksError(StorageError):
    """Blocks of keys and values are missing or damaged where a store keeps them.

    Attributes
    ----------
    reasons : dict of int to str
        What is wrong, by chunk id.
    """

    def __init__(self, reasons: Mapping[int, str]) -> None:
        self.reasons = dict(reasons)
        first = [f"chunk {chunk_id} ({reason})" for chunk_id, reason in list(self.reasons.items())[:3]]
        more = len(self.reasons) - len(first)
        named = ", ".join(first) + (f" and {more} more" if more else "")
        super().__init__(f"The keys and values of {named} are lost.")


class LostChunksWarning(UserWarning):
    """Chunks have left a bank because their keys and values were lost."""
