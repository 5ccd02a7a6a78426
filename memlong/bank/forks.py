"""What a fork leaves to the child: locks of threads that it does not have, and the parent's files."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol

Given = ParamSpec("Given")


class Heir(Protocol):
    """What has to know that it is in a forked process now."""

    def after_fork(self) -> None:
        """Put in order what threads that are not here have left; nothing else runs meanwhile."""


def tell_after_fork(heir: Heir) -> None:
    """Have an object be told, in a process that is forked while it is there."""
    _heirs.add(heir)


def fork_lock() -> threading.Lock:
    """Return a lock that is free in a forked process, whose other threads can no longer let go of it."""
    lock = threading.Lock()
    _locks.add(lock)
    return lock


def unless_forked(
    act: Callable[Given, object], *given: Given.args, **named: Given.kwargs
) -> Callable[[], None]:
    """Return a call that does something in this process alone: its children end, too, and own nothing of it."""
    owner = os.getpid()

    def end() -> None:
        if os.getpid() == owner:
            act(*given, **named)

    return end


_heirs: weakref.WeakSet[Any] = weakref.WeakSet()
_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def _tell_all() -> None:
    for lock in list(_locks):
        lock._at_fork_reinit()  # noqa: SLF001 - as Python's own modules do; a new lock would not reach who waits
    for heir in list(_heirs):
        heir.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tell_all)
