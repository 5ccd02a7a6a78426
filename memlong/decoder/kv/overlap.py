"""Fetching memory while the lower layers compute: a CUDA stream beside the model's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


class Arrival:
    """The moment at which what a side stream was given to do is done.

    Parameters
    ----------
    event
        Recorded on the side stream, after that work.
    device
        Where both streams are.
    """

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    def wait(self) -> None:
        """Let the current stream go on only after it; the host does not wait."""
        torch.cuda.current_stream(self._device).wait_event(self._event)


class SideStream:
    """Work that a device does beside what it is doing; on the CPU there is no such thing, and all is done in turn.

    Copies from pinned host memory, and what follows from them, so overlap with the layers below the first retrieval
    layer.

    Parameters
    ----------
    device
        Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _side_stream(device) if device.type == "cuda" else None

    @property
    def is_there(self) -> bool:
        """Whether anything can be done beside."""
        return self._stream is not None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Give work to the side stream; it begins after all that the current stream has been given so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let the current stream go on only after all that the side stream was given."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def hand_over(self, tensors: Iterable[Tensor]) -> Arrival | None:
        """Let tensors made beside be used by the current stream, once it has waited for the arrival."""
        if self._stream is None:
            return None
        current = torch.cuda.current_stream(self._device)
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(current)
        event = torch.cuda.Event()
        event.record(self._stream)
        return Arrival(event, self._device)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one side stream of a device: torch keeps memory apart for each stream that there ever was."""
    return torch.cuda.Stream(device)
