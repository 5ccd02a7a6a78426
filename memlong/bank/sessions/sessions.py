"""Sessions: each of a user, in memory or in a folder, and how much memory all of them take."""

from __future__ import annotations

import shutil
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from memlong.bank.snapshot.files import unreadable, unwritable
from memlong.errors import SnapshotError

_ONLY_OURS = 0o700  # no other user may read it
_FEWEST_FILES = 16

T = TypeVar("T", bound="Held")


@dataclass(frozen=True)
class Size:
    """The limited resources that sessions take: bytes of memory, and open files."""

    nbytes: int = 0
    files: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.nbytes + other.nbytes, self.files + other.files)

    def __sub__(self, other: Size) -> Size:
        return Size(self.nbytes - other.nbytes, self.files - other.files)

    def fits(self, most: Size) -> bool:
        """Whether it is within these limits."""
        return self.nbytes <= most.nbytes and self.files <= most.files


class Held(ABC):
    """What a session holds while it is in memory."""

    @property
    @abstractmethod
    def size(self) -> Size:
        """What it takes."""

    @property
    @abstractmethod
    def is_unused(self) -> bool:
        """Whether nothing was ever added to it."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write it into the session's folder."""

    @abstractmethod
    def close(self) -> None:
        """Refuse changes from now on: it is saved, and dropped from memory."""


@dataclass(eq=False)
class Session(Generic[T]):
    """What a session holds, None while it is on disk, and its users."""

    name: str
    folder: Path
    held: T | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    visits: set[weakref.ref[Visit[T]]] = field(default_factory=set)
    size: Size = Size()

    @property
    def users(self) -> int:
        """How many `with` blocks use it."""
        return len(self.visits)

    def measured(self) -> Size:
        """Return what it takes in memory."""
        return Size() if self.held is None else self.held.size


class Visit(Generic[T]):
    """One use of a session; it ends with `Sessions.leave`, or with this object if an interrupt comes first.

    Parameters
    ----------
    session : Session
        Which is used.
    """

    def __init__(self, session: Session[T]) -> None:
        self.session = session
        session.visits.add(weakref.ref(self, session.visits.discard))

    def end(self) -> None:
        """Note that it is over."""
        self.session.visits.discard(weakref.ref(self))


class Sessions(Generic[T]):
    """Sessions in memory, least recently used first; no call takes longer when there are more of them.

    What a session takes is measured when its last user leaves it: an idle one does not change.
    """

    def __init__(self) -> None:
        self._all: OrderedDict[str, Session[T]] = OrderedDict()
        self._in_use: set[Session[T]] = set()
        self._idle = Size()

    def enter(self, name: str, folder: Path) -> Visit[T]:
        """Begin to use a session, a new one if there is none."""
        session: Session[T] = self._all.get(name) or Session(name, folder)
        self._in_use.add(session)  # first: what an interrupt leaves half done is settled from here
        self._all[name] = session
        visit = Visit(session)
        self._measure(session, Size())
        self._all.move_to_end(name)
        return visit

    def leave(self, visit: Visit[T]) -> None:
        """Note that a user has left; the session is forgotten with the last one if it holds nothing."""
        visit.end()
        self._settle()

    def _settle(self) -> None:
        for session in [each for each in self._in_use if not each.users]:
            self._rest(session)
            self._in_use.discard(session)

    def _rest(self, session: Session[T]) -> None:
        if session.held is not None and session.held.is_unused:
            session.held = None
        self._measure(session, session.measured())
        if session.held is None and self._all.get(session.name) is session:
            del self._all[session.name]

    def forget(self, session: Session[T]) -> None:
        """Drop an idle session from memory."""
        session.held = None
        self._measure(session, Size())
        self._all.pop(session.name, None)

    def oldest(self, but: set[Session[T]]) -> Session[T] | None:
        """Return the least recently used idle session, of those not in ``but``."""
        for session in self._all.values():
            if not session.users and session not in but:
                return session
        return None

    def size(self) -> Size:
        """Return what all sessions take."""
        self._settle()
        total = self._idle
        for session in self._in_use:
            total += session.measured()
        return total

    def __iter__(self) -> Iterator[Session[T]]:
        return iter(list(self._all.values()))

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, name: str) -> bool:
        return name in self._all

    def _measure(self, session: Session[T], size: Size) -> None:
        self._idle, session.size = self._idle - session.size + size, size


def most_files() -> int:
    """Return how many files may stay open: half of the system's limit, since saving needs some, too."""
    if sys.platform == "win32":
        return 4096  # of 8192 that its C library has
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(_FEWEST_FILES, limit // 2)


def save(session: Session[T]) -> list[SnapshotError]:
    """Save a session, if it ever held anything; returns the error, so that others can be saved."""
    held = session.held
    if held is None or held.is_unused:
        return []
    try:
        make_folder(session.folder)
        held.save(session.folder)
    except SnapshotError as error:
        return [error]
    except Exception as error:  # noqa: BLE001 - from any store or index; callers raise or warn
        failure = SnapshotError(f"{str(session.folder)!r} could not be saved: {error}")
        failure.__cause__ = error
        return [failure]
    return []


def raise_all(failures: list[SnapshotError]) -> None:
    """Raise the errors of some sessions, if there are any."""
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise SnapshotError(
            f"{len(failures)} sessions could not be saved: {'; '.join(map(str, failures))}"
        ) from ExceptionGroup("sessions that could not be saved", failures)


def make_folder(folder: Path) -> None:
    """Make a folder that only this user can read."""
    try:
        folder.mkdir(_ONLY_OURS, parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error


def folders(folder: Path, prefix: str) -> list[Path]:
    """Return the entries of a folder whose names start with a prefix."""
    try:
        return [path for path in folder.iterdir() if path.name.startswith(prefix)]
    except OSError as error:
        raise unreadable(folder, error) from error


def remove(folder: Path) -> None:
    """Remove the folder of a deleted session."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise SnapshotError(
            f"{str(folder)!r} holds a session that was deleted, and cannot be removed: {error.strerror or error}. "
            "Remove it, or change its rights: the next pool in this folder tries again"
        ) from error
