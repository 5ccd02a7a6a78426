"""Workers: a thread pool for many small reads and writes to a disk or network."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, Generic, TypeVar

from memlong.bank.forks import fork_lock

Given = TypeVar("Given")

MOST_THREADS = 256
"""Threads of a process at most, and so the most readers of a store."""


class Workers:
    """Threads for I/O that all banks of a process share; the caller works, too.

    The caller starts at once on one item after another, and threads join in, each waking the next. Slow items therefore
    run in parallel, and a few quick ones do not wait for threads to start.

    Parameters
    ----------
    count : int
        Maximum number of items processed at a time.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def each(self, act: Callable[[Given], Any], given: Sequence[Given]) -> None:
        """Call a function on each item, and return when no call is running anymore.

        The first error is raised; items that have not been started by then are skipped.
        """
        task = _Task(act, given)
        try:
            if len(given) > 1:
                task.call_helper(_THREADS.pool(), self._count - 1)
            task.work()
        finally:
            task.dismiss_helpers()
        if task.errors:
            try:
                raise task.errors[0]
            finally:
                task.errors.clear()  # otherwise the error would refer to itself, and keep its frames alive


class _Threads:
    """The threads of this process: none until they are needed, and no more than were ever busy at a time."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._owner = os.getpid()
        self._starting = fork_lock()

    def pool(self) -> ThreadPoolExecutor:
        """Return the pool, made on first use; a forked process has none of its parent's threads, so makes its own."""
        with self._starting:
            if self._pool is None or os.getpid() != self._owner:
                self._owner = os.getpid()
                self._pool = ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="memlong-kv")
            return self._pool


_THREADS = _Threads()


class _Task(Generic[Given]):
    """Items to process, by the caller and by helper threads."""

    def __init__(self, act: Callable[[Given], Any], given: Sequence[Given]) -> None:
        self._act, self._todo = act, deque(given)
        self._helpers: list[Future[None]] = []
        self.errors: list[BaseException] = []

    def call_helper(self, pool: ThreadPoolExecutor, most: int) -> None:
        """Start one more helper if there is work left, up to ``most`` of them."""
        if self._todo and not self.errors and len(self._helpers) < most:
            # At interpreter exit no threads can be started: the caller works alone.
            with suppress(RuntimeError):
                self._helpers.append(pool.submit(self._help, pool, most))

    def _help(self, pool: ThreadPoolExecutor, most: int) -> None:
        self.call_helper(pool, most)
        self.work()

    def work(self) -> None:
        """Process items until none are left."""
        while self._todo and not self.errors:
            try:
                one = self._todo.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                self._act(one)
            except BaseException as error:  # noqa: BLE001 - raised in the caller
                self.errors.append(error)

    def dismiss_helpers(self) -> None:
        """Wait for running helpers; those that they start in the meantime are appended to the list before they end."""
        for helper in self._helpers:
            if not helper.cancel():
                wait([helper])
        del self._act  # a thread may keep this object a moment longer, but must not keep the caller's
