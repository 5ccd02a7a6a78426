"""What a forked process must repair: locks held by threads that it does not have, and the parent's files."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

Given = ParamSpec("Given")
Lock = TypeVar("Lock")


class ForkAware(Protocol):
    """An object that must know when it is in a forked process."""

    def after_fork(self) -> None:
        """Undo what threads that exist only in the parent left half done; nothing else runs in the meantime."""


def tell_after_fork(thing: ForkAware) -> None:
    """Have `after_fork` of an object called in every process that is forked while the object exists."""
    _note(_aware, thing)


def fork_lock() -> threading.Lock:
    """Return a lock that is free in a forked process, where the threads that held it do not exist."""
    return free_after_fork(threading.Lock())


def free_after_fork(lock: Lock) -> Lock:
    """Have a lock of any kind in `threading` be free in forked processes; returns it."""
    _note(_locks, lock)
    return lock


def unless_forked(
    act: Callable[Given, object], *given: Given.args, **named: Given.kwargs
) -> Callable[[], None]:
    """Return a call that acts in this process only: forked children end, too, but own nothing of it."""
    owner = os.getpid()

    def end() -> None:
        if os.getpid() == owner:
            act(*given, **named)

    return end


_aware: set[weakref.ref[Any]] = set()
_locks: set[weakref.ref[Any]] = set()


def _note(known: set[weakref.ref[Any]], thing: object) -> None:
    known.add(weakref.ref(thing, known.discard))  # no WeakSet, whose Python code would swallow an interrupt


def _tell_all() -> None:
    for lock in _alive(_locks):
        lock._at_fork_reinit()  # noqa: SLF001 - as Python's own modules do
    for thing in _alive(_aware):
        thing.after_fork()


def _alive(known: set[weakref.ref[Any]]) -> list[Any]:
    return [thing for each in list(known) if (thing := each()) is not None]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tell_all)
