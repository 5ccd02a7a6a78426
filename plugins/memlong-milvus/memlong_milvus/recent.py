"""What a bank changed so lately that Milvus may not show it yet."""

from __future__ import annotations

import time
from collections import deque


class Recent:
    """Additions and removals of the last seconds.

    Parameters
    ----------
    window : float
        Seconds that a search may lag behind; 0 where it does not.
    """

    def __init__(self, window: float) -> None:
        self._window = window
        self._added: deque[tuple[float, int]] = deque()
        self._removed: deque[tuple[float, int]] = deque()

    def note_added(self, lowest: int) -> None:
        """Note that chunks with this id and above were added now."""
        if self._window:
            self._added.append((time.monotonic(), lowest))

    def note_removed(self, count: int) -> None:
        """Note that so many chunks were removed now."""
        if self._window:
            self._removed.append((time.monotonic(), count))

    def lowest_added(self) -> int | None:
        """Return the least id that a search may not find yet; None if it finds all."""
        return min((lowest for _, lowest in self._of_now(self._added)), default=None)

    def removed(self) -> int:
        """Return how many chunks a search may find that are gone."""
        return sum(count for _, count in self._of_now(self._removed))

    def _of_now(self, notes: deque[tuple[float, int]]) -> list[tuple[float, int]]:
        # Searches run together, and a deque that another one shortens meanwhile cannot be walked.
        since = time.monotonic() - self._window
        while notes and notes[0][0] < since:
            try:
                oldest = notes.popleft()
            except IndexError:
                break
            if oldest[0] >= since:
                notes.appendleft(oldest)
        return [note for note in notes.copy() if note[0] >= since]
