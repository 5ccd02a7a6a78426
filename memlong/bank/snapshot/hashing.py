"""SHA-256 of what is read, in another thread where that is a lot."""

from __future__ import annotations

import _thread
import hashlib
import weakref
from queue import Empty, SimpleQueue
from typing import Any

_LARGE = 1 << 16
_PATIENCE = 10.0  # seconds


class Hashing:
    """The hash of a sequence of pieces; large ones are hashed in another thread while the owner continues.

    An interrupt (KeyboardInterrupt) that comes while a `Thread` starts, as a pool of them does inside, can leave both
    threads waiting forever. Here every step that another thread sees is atomic, and the owner waits only for pieces
    that the thread was given; a thread whose owner is gone ends by itself.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._todo: SimpleQueue[Any] | None = None
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._is_waiting = False

    def update(self, piece: Any) -> None:
        """Add a piece, which must not change until the next one or the end."""
        self._wait()
        if self._todo is None and memoryview(piece).nbytes >= _LARGE:
            self._start()
        if self._todo is None:
            self._hash.update(piece)
        else:
            self._todo.put(piece)
            self._is_waiting = True

    def hexdigest(self) -> str:
        """Return the hash of all pieces."""
        self._wait()
        return self._hash.hexdigest()

    def end(self) -> None:
        """End the thread."""
        if self._todo is not None:
            self._todo.put(None)

    def _start(self) -> None:
        self._todo = SimpleQueue()
        try:
            _thread.start_new_thread(_work, (weakref.ref(self), self._hash, self._todo, self._done))
        except RuntimeError:  # no thread can be started
            self._todo = None

    def _wait(self) -> None:
        """Wait for the last piece: if more than one could wait, all that is read would stay in memory."""
        if self._is_waiting:
            error = self._done.get()
            self._is_waiting = False
            if error is not None:
                raise error


def _work(
    owner: weakref.ref[Hashing],
    digest: Any,
    todo: SimpleQueue[Any],
    done: SimpleQueue[BaseException | None],
) -> None:
    while True:
        try:
            piece = todo.get(timeout=_PATIENCE)
        except Empty:
            if owner() is None:
                return
            continue
        if piece is None:
            return
        try:
            digest.update(piece)
        except BaseException as error:  # noqa: BLE001 - raised in the waiting thread
            done.put(error)
        else:
            done.put(None)
        del piece
