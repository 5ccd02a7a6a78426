"""Engine: a connection to one Milvus, whose calls are tried again while that makes sense."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import stamina
from pymilvus import MilvusClient, MilvusException

from memlong.errors import InvalidArgumentError, MemlongError
from memlong_milvus.failures import explained, is_passing
from memlong_milvus.quiet import quietly
from memlong_milvus.uri import Address

_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0
_LAST_TIMEOUT = 2.0


class Engine:
    """One Milvus as one user sees it; banks share it, and many threads may use it.

    Parameters
    ----------
    address : Address
        Where it is.
    timeout : float
        Seconds that one attempt may take.
    attempts : int
        How often a call is tried while nobody answers, with pauses that grow from 0.2 to 5 seconds.

    Raises
    ------
    BackendError
        If it cannot be connected to.
    """

    def __init__(self, address: Address, *, timeout: float, attempts: int) -> None:
        self.address = address
        self._timeout, self._attempts = timeout, attempts
        self._claims: dict[str, Callable[[], None] | None] = {}
        self._doomed: deque[Callable[[], None]] = deque()
        self.setting_up = threading.Lock()
        if address.is_local:
            _make_room(address)
        self._client: MilvusClient = self._tried("be connected to", self._connect)

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of `MilvusClient` with a deadline, again while that makes sense.

        Whatever is called must come to the same if it is done twice.

        Raises
        ------
        BackendError
            If it fails for good; it names what, where and why.
        """
        function = getattr(self._client, method)
        return self._tried(
            method.replace("_", " "), lambda: function(*arguments, timeout=self._timeout, **options)
        )

    def claim(self, key: str, name: str, end: Callable[[], None] | None) -> None:
        """Note that a bank has a session; ``end`` removes what nobody wants after it.

        Raises
        ------
        InvalidArgumentError
            If another bank of this process has it.
        """
        if key in self._claims:
            raise InvalidArgumentError(
                f"the session {name!r} is in use by another bank of this process; a session is one bank's"
            )
        self._claims[key] = end

    def release(self, key: str) -> None:
        """Note that the bank is gone; safe in a finalizer, where nothing may be waited for."""
        end = self._claims.pop(key, None)
        if end is not None:
            self._doomed.append(end)

    def bury(self) -> None:
        """Remove what is left of banks that are gone; what cannot be removed is left to `sweep`."""
        while self._doomed:
            with suppress(MemlongError):
                self._doomed.popleft()()

    def bury_all(self) -> None:
        """Remove what is left of all banks, as the process ends; where nobody answers, nothing more is asked."""
        self._attempts, self._timeout = 1, min(self._timeout, _LAST_TIMEOUT)
        ends = [end for end in (*self._doomed, *self._claims.values()) if end is not None]
        with suppress(MemlongError):
            for end in ends:
                end()

    def __repr__(self) -> str:
        return f"Engine({self.address.uri!r})"

    def _connect(self) -> MilvusClient:
        return MilvusClient(
            uri=self.address.uri,
            token=self.address.token,
            db_name=self.address.database,
            timeout=self._timeout,
        )

    def _tried(self, what: str, function: Any) -> Any:
        made = 0
        try:
            with quietly():
                for attempt in stamina.retry_context(
                    on=is_passing,
                    attempts=self._attempts,
                    timeout=None,
                    wait_initial=_FIRST_PAUSE,
                    wait_max=_LONGEST_PAUSE,
                ):
                    with attempt:
                        made = attempt.num
                        return function()
        except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError) as error:
            # The cause would show what pymilvus was given; the message says all that helps.
            raise explained(what, error, self.address, made) from None
        raise AssertionError("unreachable: the last attempt returns or raises")


class Engines:
    """Those in use, so that banks of one place share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines: dict[tuple[Any, ...], Engine] = {}
        self._folder: Path | None = None

    def at(self, address: Address | None, *, timeout: float, attempts: int) -> Engine:
        """Return the engine of an address; None is Milvus Lite on a file that goes when this process does."""
        with self._lock:
            address = address or Address(str(self._temporary_folder() / "lite.db"))
            key = (address.uri, address.token, address.database, timeout, attempts)
            engine = self._engines.get(key)
            if engine is None:
                engine = self._engines[key] = Engine(address, timeout=timeout, attempts=attempts)
                temporary = self._folder is not None and Path(address.uri).parent == self._folder
                if not temporary:
                    atexit.register(engine.bury_all)
            return engine

    def _temporary_folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="memlong-milvus-"))
            atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder


def _make_room(address: Address) -> None:
    try:
        Path(address.uri).absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgumentError(
            f"uri is {address.uri!r}, whose folder cannot be made: {error.strerror}"
        ) from error


ENGINES = Engines()
"""Milvus Lite allows one engine a file in a process, so there is one place that knows them."""
