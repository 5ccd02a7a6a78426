"""What CUDA streams have been told to do with memory that several of them, and the host, use."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Traffic:
    """Reads and writes of one piece of memory that streams have been given, and may not have come to yet.

    The last of each stream is enough, as a stream does one thing after the other.
    """

    __slots__ = ("_read", "_written")

    def __init__(self) -> None:
        self._written: dict[torch.cuda.Stream, torch.cuda.Event] = {}
        self._read: dict[torch.cuda.Stream, torch.cuda.Event] = {}

    def hold_back(self, stream: torch.cuda.Stream, *, writing: bool) -> None:
        """Let a stream read the memory, or write to it, only after what this could disturb; the host goes on."""
        for doings in self._disturbed_by(writing):
            for other, event in list(doings.items()):
                if event.query():
                    doings.pop(other, None)
                elif other != stream:
                    stream.wait_event(event)

    def wait(self, *, writing: bool) -> None:
        """Have the host wait until it may read the memory, or write to it."""
        for doings in self._disturbed_by(writing):
            for other, event in list(doings.items()):
                if not event.query():
                    event.synchronize()
                doings.pop(other, None)

    def add(self, stream: torch.cuda.Stream, event: torch.cuda.Event, *, writing: bool) -> None:
        """Note an event that a stream comes to when it has read the memory, or written to it."""
        (self._written if writing else self._read)[stream] = event

    def _disturbed_by(self, writing: bool) -> tuple[dict[torch.cuda.Stream, torch.cuda.Event], ...]:
        return (self._written, self._read) if writing else (self._written,)


def note(places: Iterable[Traffic], stream: torch.cuda.Stream, *, writing: bool) -> None:
    """Note that what a stream has been given so far reads some places, or writes to them."""
    event = torch.cuda.Event()
    event.record(stream)
    for traffic in places:
        traffic.add(stream, event, writing=writing)
