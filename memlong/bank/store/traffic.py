"""Pending reads and writes by CUDA streams of memory that several streams and the host share."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Traffic:
    """Reads and writes of one piece of memory that streams may not have completed yet.

    Only the last one of each stream is recorded, as a stream works sequentially.
    """

    __slots__ = ("_read", "_written")

    def __init__(self) -> None:
        self._written: dict[torch.cuda.Stream, torch.cuda.Event] = {}
        self._read: dict[torch.cuda.Stream, torch.cuda.Event] = {}

    def hold_back(self, stream: torch.cuda.Stream, *, writing: bool) -> None:
        """Make a stream wait for conflicting accesses before it reads or writes the memory; the host does not wait."""
        for doings in self._disturbed_by(writing):
            for other, event in list(doings.items()):
                if event.query():
                    doings.pop(other, None)
                elif other != stream:
                    stream.wait_event(event)

    def wait(self, *, writing: bool) -> None:
        """Block the host until it may read the memory, or write to it."""
        for doings in self._disturbed_by(writing):
            for other, event in list(doings.items()):
                if not event.query():
                    event.synchronize()
                doings.pop(other, None)

    def add(self, stream: torch.cuda.Stream, event: torch.cuda.Event, *, writing: bool) -> None:
        """Record an event that marks when a stream has read the memory, or written to it."""
        (self._written if writing else self._read)[stream] = event

    def _disturbed_by(self, writing: bool) -> tuple[dict[torch.cuda.Stream, torch.cuda.Event], ...]:
        return (self._written, self._read) if writing else (self._written,)


def note(places: Iterable[Traffic], stream: torch.cuda.Stream, *, writing: bool) -> None:
    """Record that a stream's work so far reads some places, or writes to them."""
    event = torch.cuda.Event()
    event.record(stream)
    for traffic in places:
        traffic.add(stream, event, writing=writing)
