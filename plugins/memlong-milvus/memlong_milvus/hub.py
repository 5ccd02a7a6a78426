"""What the banks of a process share that are at one place, and where all such places are known."""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from milvus_lite.server_manager import server_manager_instance
from pymilvus import MilvusClient

from memlong.bank.forks import fork_lock, unless_forked
from memlong.errors import InvalidArgumentError, MemlongError
from memlong_milvus.errors import BackendError
from memlong_milvus.uri import Address


class Hub:
    """What the banks of a process share that are at one place.

    Parameters
    ----------
    address : Address
        Where.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.setting_up = fork_lock()
        self._owner = os.getpid()
        self.client: MilvusClient | None = None
        self.opened: set[str] = set()
        self.users: set[int] = set()
        self._numbers = itertools.count()
        self.is_ending = False
        self._claims: dict[str, Callable[[], None] | None] = {}
        self._doomed: deque[Callable[[], None]] = deque()

    @property
    def has_ended(self) -> bool:
        """Whether nobody answers any more: Milvus Lite ends before what a process registers for its end."""
        return self.is_ending and self.address.is_local

    def require_owner(self) -> None:
        """Raise BackendError in a forked process: the connection, and what ends with it, are the parent's."""
        if os.getpid() != self._owner:
            raise BackendError(
                f"the bank's connection to Milvus is that of process {self._owner}, from which this one was forked, "
                "and does not survive that; make the bank in this process, or start processes with the method 'spawn'"
            )

    def enter(self) -> int:
        """Note one more who uses the connection; ``users`` has this number until it does so no more."""
        number = next(self._numbers)
        if not number:
            atexit.register(self.bury_all)
        self.users.add(number)
        return number

    def shut(self) -> None:
        """Have Milvus Lite let go of its file, if nobody here uses it any more."""
        with self.setting_up:
            if self.users or self.client is None or not self.address.is_local or os.getpid() != self._owner:
                return
            self.client.close()
            self.client = None
            self.opened.clear()
            server_manager_instance.release_server(self.address.uri)

    def claim(self, key: str, name: str, end: Callable[[], None] | None) -> None:
        """Note that a bank has a session; ``end`` removes what nobody wants after it.

        Raises
        ------
        InvalidArgumentError
            If another bank of this process has it.
        """
        with self.setting_up:
            if key in self._claims:
                gc.collect()  # a bank that nobody can reach may be there still: in the frames of an error, say
            if key in self._claims:
                raise InvalidArgumentError(
                    f"the session {name!r} is in use by another bank of this process; a session is one bank's: "
                    "close() that one"
                )
            self._claims[key] = end

    def release(self, key: str) -> None:
        """Note that the bank is gone; safe in a finalizer, where nothing may be waited for."""
        end = self._claims.pop(key, None)
        if end is not None and os.getpid() == self._owner:  # a child's copy of a bank owns nothing
            self._doomed.append(end)

    def forget(self, key: str) -> None:
        """Note that a bank has no session any more, and that nothing is left to remove."""
        self._claims.pop(key, None)

    def bury(self) -> None:
        """Remove what is left of banks that are gone; what cannot be removed stays."""
        while self._doomed:
            with suppress(MemlongError, IndexError):
                self._doomed.popleft()()

    def bury_all(self) -> None:
        """Remove what is left of all banks, as the process ends; after a failure nothing more is asked."""
        if os.getpid() != self._owner:
            return
        self.is_ending = True
        with suppress(MemlongError, OSError, RuntimeError):  # threads that a store needs may have ended, too
            for end in (*self._doomed, *self._claims.values()):
                if end is not None:
                    end()


class Hubs:
    """The places in use: Milvus Lite allows one engine a file in a process."""

    def __init__(self) -> None:
        self._lock = fork_lock()
        self._hubs: dict[tuple[str, ...], Hub] = {}
        self._folders: dict[int, Path] = {}

    def at(self, address: Address | None) -> Hub:
        """Return what is shared at an address; None is Milvus Lite on a file that goes when this process does."""
        with self._lock:
            address = address or Address(str(self._temporary_folder() / "lite.db"))
            uri = str(Path(address.uri).resolve()) if address.is_local else address.uri
            key = (str(os.getpid()), uri, address.token, address.database)
            hub = self._hubs.get(key)
            if hub is None:
                hub = self._hubs[key] = Hub(address)
            return hub

    def _temporary_folder(self) -> Path:
        folder = self._folders.get(os.getpid())
        if folder is None:
            folder = self._folders[os.getpid()] = Path(tempfile.mkdtemp(prefix="memlong-milvus-"))
            atexit.register(unless_forked(shutil.rmtree, folder, ignore_errors=True))
        return folder


HUBS = Hubs()
"""The one place that knows them."""
