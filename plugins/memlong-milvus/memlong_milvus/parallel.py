"""Workers: threads that help whoever has many small things to do."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

Given = TypeVar("Given")


class Workers:
    """Threads that help with what waits for a disk or a network.

    Whoever asks begins at once and takes one thing after the other; the threads join in as they wake up. So many slow
    things are done together, and a few quick ones do not wait for a thread.

    Parameters
    ----------
    count : int
        How many things at most are done at a time.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ThreadPoolExecutor | None = None
        self._starting = threading.Lock()

    def each(self, act: Callable[[Given], Any], given: Sequence[Given]) -> None:
        """Do something with each thing given; nothing of it goes on afterwards.

        The first error ends it and is raised; what was not begun by then is left out.
        """
        todo = deque(given)
        errors: list[BaseException] = []

        def work() -> None:
            while todo and not errors:
                try:
                    one = todo.popleft()
                except IndexError:  # another thread has the last
                    return
                try:
                    act(one)
                except BaseException as error:  # noqa: BLE001 - raised below, by whoever asked
                    errors.append(error)

        helpers = [self._threads().submit(work) for _ in range(min(self._count, len(given)) - 1)]
        try:
            work()
        finally:
            wait([each for each in helpers if not each.cancel()])
        if errors:
            try:
                raise errors[0]
            finally:
                errors.clear()  # or the error would hold itself, and all that its frames do

    def _threads(self) -> ThreadPoolExecutor:
        with self._starting:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._count, thread_name_prefix="memlong-kv")
            return self._pool
