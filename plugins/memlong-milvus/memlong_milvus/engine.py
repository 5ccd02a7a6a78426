"""Engine: one Milvus connection as a bank uses it, with retries."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import stamina
from pymilvus import MilvusClient, MilvusException

from memlong.errors import InvalidArgumentError
from memlong_milvus.failures import explained, is_passing, without_frames
from memlong_milvus.hub import Hub
from memlong_milvus.quiet import quietly
from memlong_milvus.uri import Address

_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0
_LAST_TIMEOUT = 2.0


class Engine:
    """One Milvus, as a bank asks it; many threads may.

    Parameters
    ----------
    hub : Hub
        What it shares with others.
    timeout : float
        Seconds that one attempt may take.
    attempts : int
        How often a call is tried while nobody answers, with pauses that grow from 0.2 to 5 seconds.

    Raises
    ------
    BackendError
        If it cannot be connected to.
    """

    def __init__(self, hub: Hub, *, timeout: float, attempts: int) -> None:
        self.hub, self._timeout, self._attempts = hub, timeout, attempts
        with hub.setting_up:
            if hub.client is None:
                hub.client = self._tried("be connected to", self._connect)
            self.client: MilvusClient = hub.client
            self._leave = weakref.finalize(self, hub.users.discard, hub.enter())

    @property
    def address(self) -> Address:
        """Where it is."""
        return self.hub.address

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of `MilvusClient` with a deadline, again while that makes sense.

        Whatever is called must come to the same if it is done twice.

        Raises
        ------
        BackendError
            If it fails for good; it names what, where and why.
        """
        self.hub.require_owner()
        function = getattr(self.client, method)
        timeout = min(self._timeout, _LAST_TIMEOUT) if self.hub.is_ending else self._timeout
        return self._tried(method.replace("_", " "), lambda: function(*arguments, timeout=timeout, **options))

    def close(self) -> None:
        """Ask no more; with the last engine, Milvus Lite lets go of its file."""
        self.hub.bury()
        self._leave()
        self.hub.shut()

    def __repr__(self) -> str:
        return f"Engine({self.address.uri!r})"

    def _connect(self) -> MilvusClient:
        if self.address.is_local:
            _make_room(self.address)
        return MilvusClient(
            uri=self.address.uri,
            token=self.address.token,
            db_name=self.address.database,
            timeout=self._timeout,
        )

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


def _make_room(address: Address) -> None:
    try:
        Path(address.uri).absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgumentError(
            f"uri is {address.uri!r}, whose folder cannot be made: {error.strerror}"
        ) from error
