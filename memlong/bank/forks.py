"""What a fork leaves to the child: locks of threads that it does not have, and the parent's files."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

Given = ParamSpec("Given")
Lock = TypeVar("Lock")


class Heir(Protocol):
    """What has to know that it is in a forked process now."""

    def after_fork(self) -> None:
        """Put in order what threads that are not here have left; nothing else runs meanwhile."""


def tell_after_fork(heir: Heir) -> None:
    """Have an object be told, in a process that is forked while it is there."""
    _note(_heirs, heir)


def fork_lock() -> threading.Lock:
    """Return a lock that is free in a forked process, whose other threads can no longer let go of it."""
    return free_after_fork(threading.Lock())


def free_after_fork(lock: Lock) -> Lock:
    """Have a lock, of whichever kind in `threading`, be free in forked processes; returns it."""
    _note(_locks, lock)
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


_heirs: set[weakref.ref[Any]] = set()
_locks: set[weakref.ref[Any]] = set()


def _note(known: set[weakref.ref[Any]], thing: object) -> None:
    known.add(weakref.ref(thing, known.discard))  # no WeakSet, whose Python code would swallow an interrupt


def _tell_all() -> None:
    for lock in _alive(_locks):
        lock._at_fork_reinit()  # noqa: SLF001 - as Python's own modules do
    for heir in _alive(_heirs):
        heir.after_fork()


def _alive(known: set[weakref.ref[Any]]) -> list[Any]:
    return [thing for each in list(known) if (thing := each()) is not None]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tell_all)
