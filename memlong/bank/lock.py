"""A readers-writer lock: many threads search while at most one writes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Literal

from memlong.errors import MemlongError


class ReadWriteLock:
    """Let any number of readers in together, and a writer only alone.

    A waiting writer goes before readers that come after it, so a stream of searches cannot starve an add.
    The lock is not reentrant: a thread that holds it must not ask for it again.

    An interrupt (KeyboardInterrupt) can come before a `with` statement has let go of what it holds. So a thread that
    would wait for a hold of its own, which only an interrupt can have left behind, takes that hold to be over.
    """

    def __init__(self) -> None:
        self._renew()
        self._readers: set[Hold] = set()
        self._writers: set[Hold] = set()
        self._writers_waiting: set[Hold] = set()
        self.why_closed = ""  # to writers; nothing where they may come

    def without_others(self) -> bool:
        """In a process just forked, release what the parent's other threads hold; return whether there was any."""
        self._renew()
        others = False
        for holds in (self._readers, self._writers, self._writers_waiting):
            of_others = {each for each in holds if each.thread != threading.get_ident()}
            others = others or bool(of_others)
            holds -= of_others
        return others

    def _renew(self) -> None:
        # Entering and leaving this one is a single step for an interrupt; entering a Condition is not.
        self._mutex = threading.RLock()
        self._changed = threading.Condition(self._mutex)

    def read(self) -> Hold:
        """Hold the lock together with other readers, as a context manager."""
        return Hold(self, "read")

    def write(self) -> Hold:
        """Hold the lock alone, as a context manager."""
        return Hold(self, "write")

    def enter(self, hold: Hold) -> None:
        """Wait until a hold may begin."""
        try:
            with self._mutex:
                if hold.kind == "read":
                    self._wait(hold, lambda: not (self._writers or self._writers_waiting))
                    self._readers.add(hold)
                elif self.why_closed:
                    raise MemlongError(self.why_closed)
                else:
                    self._writers_waiting.add(hold)
                    self._wait(hold, lambda: not (self._writers or self._readers))
                    self._writers.add(hold)
                    self._writers_waiting.discard(hold)
        except BaseException:
            self.leave(hold)
            raise

    def leave(self, hold: Hold) -> None:
        """Release a hold, or end the wait for one; nothing happens if it is over."""
        with self._mutex:
            for holds in (self._readers, self._writers, self._writers_waiting):
                holds.discard(hold)
            self._changed.notify_all()

    def _wait(self, hold: Hold, is_free: Callable[[], bool]) -> None:
        if not is_free():
            for holds in (self._readers, self._writers, self._writers_waiting):
                holds -= {each for each in holds if each.thread == hold.thread and each is not hold}
        while not is_free():
            self._changed.wait()


class Hold:
    """One thread's stay in a lock.

    Parameters
    ----------
    lock : ReadWriteLock
        Where.
    kind : "read" or "write"
        With others or alone.
    """

    def __init__(self, lock: ReadWriteLock, kind: Literal["read", "write"]) -> None:
        self._lock = lock
        self.kind = kind
        self.thread = threading.get_ident()

    def __enter__(self) -> None:
        self._lock.enter(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.leave(self)
