"""Whether the installed FAISS can use a GPU, what its indexes share there, and whether one FAISS is installed."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from typing import Any
from weakref import WeakValueDictionary

import faiss
import torch

from memlong.errors import DeviceUnavailableError

_SCRATCH_BYTES = 64 << 20


@functools.cache
def owners() -> tuple[str, ...]:
    """Return the installed distributions that bring the module faiss."""
    return tuple(sorted(set(packages_distributions().get("faiss", ()))))


def warn_if_two_owners() -> None:
    """Warn if two distributions bring the module faiss: one has overwritten the other."""
    if len(owners()) > 1:
        warnings.warn(
            f"the module faiss is brought by {' and '.join(owners())}: the last installed has overwritten "
            "the other, and a GPU may be lost without a word. Uninstall all of them and install one",
            RuntimeWarning,
            stacklevel=3,
        )


def require_gpu(device: torch.device) -> None:
    """Raise DeviceUnavailableError unless FAISS can compute on the CUDA device."""
    if not hasattr(faiss, "StandardGpuResources"):
        raise DeviceUnavailableError(
            f"device {str(device)!r} was asked for, but the installed FAISS ({', '.join(owners())} "
            f"{faiss.__version__}) has no GPU code. Run: pip uninstall faiss-cpu && "
            "pip install 'memlong[faiss-gpu]'"
        )
    if (device.index or 0) >= faiss.get_num_gpus():
        raise DeviceUnavailableError(
            f"device {str(device)!r} was asked for, but FAISS sees {faiss.get_num_gpus()} GPUs; check the "
            "driver with nvidia-smi, or use device='cpu'"
        )


class GpuResources:
    """What all indexes of a process on one GPU share: FAISS's streams, handles and scratch memory, and a lock.

    By itself FAISS takes 1.5 GiB of the device and 256 MiB of page-locked memory for each of these. An index asks for a
    little where it needs more, and copies go without page-locked memory.

    FAISS-GPU is not safe for threads even when reading, so one lock holds every use.

    Parameters
    ----------
    device : int
        Number of the GPU.
    """

    def __init__(self, device: int) -> None:
        self.device = device
        self._native = faiss.StandardGpuResources()
        self._native.setTempMemory(_SCRATCH_BYTES)
        self._native.setPinnedMemory(0)
        self._owner = os.getpid()
        self._lock = threading.RLock()  # the garbage collector may dispose of an index inside of a use

    @contextmanager
    def using(self) -> Iterator[Any]:
        """Hold the lock, with FAISS's own object.

        Raises
        ------
        DeviceUnavailableError
            In a forked process: CUDA does not survive that.
        """
        if os.getpid() != self._owner:
            raise DeviceUnavailableError(
                "the bank was made on a GPU before this process was forked, and CUDA does not survive a fork; make "
                "or load the bank in this process, or start processes with the method 'spawn'"
            )
        with self._lock:
            yield self._native

    def dispose(self, indexes: list[Any]) -> None:
        """Let go of indexes, which gives memory back through what others may just be using."""
        if os.getpid() == self._owner:
            with self._lock:
                indexes.clear()


_shared: WeakValueDictionary[tuple[int, int], GpuResources] = WeakValueDictionary()


def gpu_resources(device: int) -> GpuResources:
    """Return what the indexes of this process share on a GPU, as long as somebody holds it."""
    key = (os.getpid(), device)
    found = _shared.get(key)  # two threads may make one each: that takes more memory, and is right
    if found is None:
        found = _shared[key] = GpuResources(device)
    return found
