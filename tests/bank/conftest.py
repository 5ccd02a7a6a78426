"""A stand-in for CUDA's streams and events: it notes who waits for whom; copies are made at once, on the CPU."""

from __future__ import annotations

import dis
import linecache
import sys

import pytest
import torch

from memlong.bank.store import slabs, tiers
from memlong.bank.store.slabs import Slabs


class Stream:
    """A stream that has a name."""

    def __init__(self, name: str, log: list[tuple[str, str]]) -> None:
        self.name, self._log = name, log

    def wait_event(self, event: Event) -> None:
        self._log.append((self.name, event.after))


class Event:
    """An event that is over when the test says so, or when the host has waited for it."""

    def __init__(self, cuda: StandIn) -> None:
        self._cuda = cuda
        self.after = ""
        self.over = False

    def record(self, stream: Stream) -> None:
        self.after = f"{stream.name}:{self._cuda.count}"
        self._cuda.count += 1
        self._cuda.events.append(self)

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        self._cuda.log.append(("host", self.after))
        self.over = True


class StandIn:
    """Streams by name, of which one is current; `log` holds (who waits, stream:number of the event)."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.events: list[Event] = []
        self.count = 0
        self.current = self.stream("main")

    def stream(self, name: str) -> Stream:
        return Stream(name, self.log)

    def finish(self) -> None:
        """Let the device come to the end of what it was given."""
        for event in self.events:
            event.over = True


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Streams and events that stand in for CUDA's; stores keep records of the CPU in slots."""
    cuda = StandIn()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: cuda.current)
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(cuda))
    monkeypatch.setattr(slabs, "page_locked", lambda count, size: torch.zeros(count, size, dtype=torch.uint8))
    monkeypatch.setattr(
        tiers, "_slabs_for", lambda layout, codec, budget: Slabs(codec.nbytes, layout.device, budget)
    )
    return cuda


@pytest.fixture
def interrupting():
    """Interrupt a call before a line of some files; from Python 3.12 on an interrupt comes at other places."""
    if sys.version_info >= (3, 12):
        pytest.skip("from Python 3.12 on an interrupt comes at other places than before a line")
    return lambda files: lambda call, at: _interrupted(files, call, at)


def _interrupted(files, call, at):
    """Make the call, raise KeyboardInterrupt before the line number `at` that it runs; False if it ends before."""
    left = at

    def on_line(frame, event, _):
        nonlocal left
        if event == "line" and not _is_out_of_reach(frame):
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return on_line

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: on_line if frame.f_code.co_filename in files else None)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def _is_out_of_reach(frame):
    """Python delivers no interrupt at a bare `try:`, nor between a `with` block and the call of `__exit__`."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    operation = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    leaves = line.lstrip().startswith("with ") and operation in ("LOAD_CONST", "PUSH_EXC_INFO", "SWAP")
    return leaves or operation == "NOP"
