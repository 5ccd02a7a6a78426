"""The connection to one Milvus: what the banks of a process share, and calls with a deadline and retries."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from weakref import finalize

import grpc
import stamina
from milvus_lite.server_manager import server_manager_instance
from pymilvus import MilvusClient, MilvusException

from memlong.bank.forks import fork_lock, unless_forked
from memlong.errors import InvalidArgumentError, MemlongError
from memlong_milvus.errors import BackendError
from memlong_milvus.failures import explained, is_passing, quietly, without_frames
from memlong_milvus.uri import Address

_FIRST_PAUSE, _LONGEST_PAUSE, _LAST_TIMEOUT = 0.2, 5.0, 2.0  # seconds


class Hub:
    """What the banks of a process share at one address: the client, the sessions in use, what is to be removed."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.lock = fork_lock()
        self.client: MilvusClient | None = None
        self.opened: set[str] = set()
        self.is_ending = False
        self._owner = os.getpid()
        self._users: list[finalize[..., Any]] = []
        self._claims: dict[str, finalize[..., Any]] = {}
        self._doomed: deque[Callable[[], None]] = deque()
        atexit.register(self._end)

    @property
    def has_ended(self) -> bool:
        """Whether Milvus Lite has stopped: at exit it does so before any function of atexit."""
        return self.is_ending and self.address.is_local

    def require_owner(self) -> None:
        """Raise BackendError in a forked process, which has no connection of its own."""
        if os.getpid() != self._owner:
            raise BackendError(
                f"the bank's connection to Milvus is that of process {self._owner}, from which this one was forked, "
                "and does not survive that; make the bank in this process, or start processes with the method 'spawn'"
            )

    def connect(self, user: Engine, connect: Callable[[], MilvusClient]) -> finalize[..., Any]:
        """Keep a client until the user is gone, or detaches what is returned."""
        self._bury()
        with self.lock:
            if self.client is None:
                self.client = connect()
            use = finalize(user, self._settle_soon)
            use.atexit = False
            self._users = [*(each for each in self._users if each.alive), use]
            return use

    def settle(self) -> None:
        """Remove what is left of banks that are gone, and close a local file that nobody here uses."""
        self._bury()
        with self.lock:
            is_used = any(each.alive for each in self._users)
            if is_used or self.client is None or not self.address.is_local or os.getpid() != self._owner:
                return
            self.client.close()
            self.client = None
            self.opened.clear()
            server_manager_instance.release_server(self.address.uri)

    def claim(self, bank: object, key: str, name: str, end: Callable[[], None]) -> finalize[..., Any]:
        """Give a bank a session until it detaches what is returned, or is gone: then ``end`` is called.

        InvalidArgumentError if another bank of this process has it.
        """
        with self.lock:
            if self._claimed(key):
                gc.collect()  # an unreachable bank may still be there: in the frames of an error, say
            if self._claimed(key):
                raise InvalidArgumentError(
                    f"the session {name!r} is in use by another bank of this process; a session is one bank's: "
                    "close() that one"
                )
            claim = self._claims[key] = finalize(bank, self._doom, end)
            claim.atexit = False
            return claim

    def _claimed(self, key: str) -> bool:
        self._claims = {each: claim for each, claim in self._claims.items() if claim.alive}
        return key in self._claims

    def _doom(self, end: Callable[[], None]) -> None:
        if os.getpid() == self._owner:  # a child's copy of a bank owns nothing
            self._doomed.append(end)
            self._settle_soon()

    def _settle_soon(self) -> None:
        """Settle in another thread: a finalizer may run while its own thread holds the lock."""
        if self.address.is_local and not self.is_ending and os.getpid() == self._owner:
            with suppress(RuntimeError):  # too late in the process for a thread
                start_new_thread(self.settle, ())

    def _bury(self) -> None:
        if os.getpid() != self._owner:
            return
        with self.lock:
            while self._doomed:
                with suppress(
                    Exception
                ):  # what cannot be removed stays, and is no failure of the bank that connects
                    self._doomed.popleft()()

    def _end(self) -> None:
        """Remove what is left of all banks as the process ends; after a failure nothing more is asked."""
        if os.getpid() != self._owner:
            return
        self.is_ending = True
        for claim in list(self._claims.values()):
            claim()  # dooms what is left of its session, if that is still claimed
        with self.lock, suppress(MemlongError, OSError, RuntimeError):  # a store's threads may have ended
            for end in self._doomed:
                end()


_LOCK, _HUBS = fork_lock(), dict[tuple[int, Address], Hub]()


def _hub_at(address: Address | None) -> Hub:
    """Return the hub of an address; None is Milvus Lite on a file that goes when this process does."""
    with _LOCK:
        address = address or Address(_temporary_file(os.getpid()))
        resolved = replace(address, uri=str(Path(address.uri).resolve())) if address.is_local else address
        key = (os.getpid(), resolved)
        if key not in _HUBS:
            _HUBS[key] = Hub(resolved)  # the working directory may change
        return _HUBS[key]


@cache
def _temporary_file(_: int) -> str:
    folder = tempfile.mkdtemp(prefix="memlong-milvus-")
    atexit.register(unless_forked(shutil.rmtree, folder, ignore_errors=True))
    return f"{folder}/lite.db"


class Engine:
    """A bank's connection to one Milvus, for many threads; an address of None is Milvus Lite on a temporary file.

    While Milvus does not answer, a call is tried ``attempts`` times, each for up to ``timeout`` seconds, with pauses
    that grow from 0.2 to 5 seconds.
    """

    def __init__(self, address: Address | None, *, timeout: float, attempts: int) -> None:
        self.hub, self._timeout, self._attempts = _hub_at(address), timeout, attempts
        self._use = self.hub.connect(self, lambda: self._tried("be connected to", self._connect))
        self.client: Any = self.hub.client

    @property
    def address(self) -> Address:
        """Where it is."""
        return self.hub.address

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of `MilvusClient`, one that may be repeated; BackendError if it fails for good."""
        self.hub.require_owner()
        function = getattr(self.client, method)
        timeout = min(self._timeout, _LAST_TIMEOUT) if self.hub.is_ending else self._timeout
        return self._tried(method.replace("_", " "), lambda: function(*arguments, timeout=timeout, **options))

    def close(self) -> None:
        """Let go of the connection; with the last engine, Milvus Lite closes its file."""
        self._use.detach()
        self.hub.settle()

    def __repr__(self) -> str:
        return f"Engine({self.address.uri!r})"

    def _connect(self) -> MilvusClient:
        uri, token, database = self.address.uri, self.address.token, self.address.database
        if self.address.is_local:
            try:
                Path(uri).absolute().parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InvalidArgumentError(
                    f"uri is {uri!r}, whose folder cannot be made: {error.strerror}"
                ) from error
        return MilvusClient(uri=uri, token=token, db_name=database, timeout=self._timeout)

    def _tried(self, what: str, function: Callable[[], Any]) -> Any:
        made = 0
        try:
            with quietly():
                for attempt in stamina.retry_context(
                    on=is_passing,
                    attempts=1 if self.hub.is_ending else self._attempts,
                    timeout=None,
                    wait_initial=_FIRST_PAUSE,
                    wait_max=_LONGEST_PAUSE,
                ):
                    with attempt:
                        made = attempt.num
                        return function()
        except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError) as error:
            # The cause would show what pymilvus was given; the message says all that helps.
            without_frames(error)
            raise explained(what, error, self.address, made) from None
        raise AssertionError("unreachable: the last attempt returns or raises")
