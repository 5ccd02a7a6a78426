"""Workers: threads for many small reads and writes that wait for a disk or a network."""

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
    """Threads that help with what waits for a disk or a network; all banks of a process share them.

    Whoever asks begins at once and takes one thing after the other, and threads join in, each waking up the next. So
    many slow things are done together, and a few quick ones do not wait for threads.

    Parameters
    ----------
    count : int
        How many things at most are done at a time.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def each(self, act: Callable[[Given], Any], given: Sequence[Given]) -> None:
        """Do something with each thing given; nothing of it goes on afterwards.

        The first error ends it and is raised; what was not begun by then is left out.
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
                task.errors.clear()  # or the error would hold itself, and all that its frames do


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
    """Things to do, by whoever asked and by helpers."""

    def __init__(self, act: Callable[[Given], Any], given: Sequence[Given]) -> None:
        self._act, self._todo = act, deque(given)
        self._helpers: list[Future[None]] = []
        self.errors: list[BaseException] = []

    def call_helper(self, pool: ThreadPoolExecutor, most: int) -> None:
        """Have one thread help, if that makes sense and it is at most so many."""
        if self._todo and not self.errors and len(self._helpers) < most:
            # Where the interpreter is ending, no thread starts: the caller works alone.
            with suppress(RuntimeError):
                self._helpers.append(pool.submit(self._help, pool, most))

    def _help(self, pool: ThreadPoolExecutor, most: int) -> None:
        self.call_helper(pool, most)
        self.work()

    def work(self) -> None:
        """Take one thing after the other until there are no more."""
        while self._todo and not self.errors:
            try:
                one = self._todo.popleft()
            except IndexError:  # another thread has the last
                return
            try:
                self._act(one)
            except BaseException as error:  # noqa: BLE001 - raised by whoever asked
                self.errors.append(error)

    def dismiss_helpers(self) -> None:
        """Wait for those who are at work; a helper that one of them calls meanwhile is in the list by then."""
        for helper in self._helpers:
            if not helper.cancel():
                wait([helper])
        del self._act  # a thread may hold this object a moment longer, but nothing of its caller
