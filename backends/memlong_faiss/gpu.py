"""GPU support of the installed FAISS: checks, and the resources that its indexes share."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from typing import Any
from weakref import WeakValueDictionary

import faiss
import torch

from memlong.bank.warn import warn_caller
from memlong.errors import DeviceUnavailableError

_SCRATCH_BYTES = 64 << 20


@functools.cache
def owners() -> tuple[str, ...]:
    """Return the installed distributions that provide the faiss module."""
    return tuple(sorted(set(packages_distributions().get("faiss", ()))))


def warn_if_two_owners() -> None:
    """Warn if two distributions provide the faiss module, because one has overwritten the other."""
    if len(owners()) > 1:
        warn_caller(
            f"The faiss module is provided by {' and '.join(owners())}: the last one installed has overwritten the "
            "other, which may silently disable the GPU. Uninstall both and install one",
            RuntimeWarning,
        )


def require_gpu(device: torch.device) -> None:
    """Raise DeviceUnavailableError unless FAISS can compute on the CUDA device."""
    if not hasattr(faiss, "StandardGpuResources"):
        raise DeviceUnavailableError(
            f"device must be 'cpu', as the installed FAISS ({', '.join(owners())} {faiss.__version__}) has no GPU "
            f"support, got {str(device)!r}: pip uninstall faiss-cpu && pip install 'memlong[faiss-gpu]'"
        )
    if (device.index or 0) >= faiss.get_num_gpus():
        raise DeviceUnavailableError(
            f"device must be one of the {faiss.get_num_gpus()} GPUs that FAISS sees, got {str(device)!r}: check the "
            "driver with nvidia-smi, or use device='cpu'"
        )


class GpuResources:
    """FAISS's streams, handles and scratch memory, and a lock, shared by all indexes of a process on one GPU.

    By default FAISS reserves 1.5 GiB of device memory and 256 MiB of page-locked memory for each of these. Here it
    reserves little, and allocates more when an index needs it; copies do not use page-locked memory.

    FAISS-GPU is not thread-safe even for reading, so a lock guards every use.

    Parameters
    ----------
    device : int
        Index of the GPU.
    """

    def __init__(self, device: int) -> None:
        self.device = device
        self._native = faiss.StandardGpuResources()
        self._native.setTempMemory(_SCRATCH_BYTES)
        self._native.setPinnedMemory(0)
        self._owner = os.getpid()
        self._lock = (
            threading.RLock()
        )  # reentrant: the garbage collector may dispose of an index while it is held

    @contextmanager
    def using(self) -> Iterator[Any]:
        """Hold the lock and yield FAISS's resources object.

        Raises
        ------
        DeviceUnavailableError
            In a forked process, since CUDA does not survive a fork.
        """
        if os.getpid() != self._owner:
            raise DeviceUnavailableError(
                "The bank was created on a GPU before this process was forked, and CUDA does not survive a fork: "
                "create or load the bank in this process, or use the start method 'spawn'"
            )
        with self._lock:
            yield self._native

    def dispose(self, indexes: list[Any]) -> None:
        """Free indexes under the lock, since that uses the shared resources."""
        if os.getpid() == self._owner:
            with self._lock:
                indexes.clear()


_shared: WeakValueDictionary[tuple[int, int], GpuResources] = WeakValueDictionary()


def gpu_resources(device: int) -> GpuResources:
    """Return the shared resources of this process on a GPU, kept as long as they are referenced."""
    key = (os.getpid(), device)
    found = _shared.get(key)  # a race between threads creates two, which costs memory but is correct
    if found is None:
        found = _shared[key] = GpuResources(device)
    return found
