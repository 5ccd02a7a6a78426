"""Whether the installed FAISS can use a GPU, and whether one FAISS is installed at all."""

from __future__ import annotations

import functools
import warnings
from importlib.metadata import packages_distributions

import faiss
import torch

from memlong.errors import DeviceUnavailableError


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
