"""A CUDA stream that fetches retrieved K-V while the lower layers compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


class CopyEvent:
    """The point at which work given to the copy stream is done.

    Parameters
    ----------
    event
        Recorded on the copy stream, after that work.
    device
        The device of both streams.
    """

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    def wait(self) -> None:
        """Make the current stream wait for the event; the host does not wait."""
        torch.cuda.current_stream(self._device).wait_event(self._event)


class CopyStream:
    """A second stream on a CUDA device; on other devices everything runs in turn.

    Copies from pinned host memory, and what depends on them, overlap with the layers below the first retrieval layer.

    Parameters
    ----------
    device
        The model's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _copy_stream(device) if device.type == "cuda" else None

    @property
    def is_available(self) -> bool:
        """Whether the device can copy while it computes."""
        return self._stream is not None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Issue work to the copy stream; it starts after everything issued to the current stream so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Make the current stream wait for everything issued to the copy stream."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def record(self, tensors: Iterable[Tensor]) -> CopyEvent | None:
        """Return the event after which the current stream may use tensors made on the copy stream."""
        if self._stream is None:
            return None
        current = torch.cuda.current_stream(self._device)
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(current)
        event = torch.cuda.Event()
        event.record(self._stream)
        return CopyEvent(event, self._device)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the device's one copy stream: torch keeps a memory pool for every stream ever created."""
    return torch.cuda.Stream(device)
