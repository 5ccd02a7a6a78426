"""Copy K-V blocks, which takes most of the time of a retrieval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_FEW = 8
_GRAIN = 1 << 15  # torch copies up to this many elements in one thread
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def stack(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a contiguous stack of copies of blocks of the same shape, dtype and device.

    On the CPU a single thread copies, which saturates memory bandwidth. The threads of torch's own copy wait for one
    another at every block, for milliseconds if the cores are busy with other work.

    Parameters
    ----------
    blocks : sequence of torch.Tensor
        n >= 1 blocks, with any strides.

    Returns
    -------
    torch.Tensor
        [n, *block], on the device of the blocks.
    """
    first = blocks[0]
    if first.device.type != "cpu":
        return torch.stack(tuple(blocks))
    stacked = torch.empty(len(blocks), *first.shape, dtype=first.dtype, device=first.device)
    together = _GRAIN // max(first.numel(), 1)
    if together < _FEW:
        for target, block in zip(_bits_of(stacked), blocks, strict=True):
            np.copyto(target, _bits_of(block))
    else:  # small blocks: torch copies many in one call
        for start in range(0, len(blocks), together):
            part = slice(start, start + together)
            torch.stack([block.detach() for block in blocks[part]], out=stacked[part])
    return stacked


def separate(blocks: torch.Tensor) -> list[torch.Tensor]:
    """Return contiguous copies of the blocks in [n, *block], each in its own memory, on their device."""
    if blocks.device.type != "cpu":
        return [stack([block])[0] for block in blocks]
    return [torch.from_numpy(block.copy()).view(blocks.dtype) for block in _bits_of(blocks)]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; from the host, a small one is copied to CUDA without synchronizing."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def keep_while_read(blocks: Iterable[torch.Tensor]) -> None:
    """Keep the memory of blocks on a CUDA device allocated until the current stream has read them.

    Otherwise, memory allocated on another stream returns to that stream as soon as nothing refers to it, and may be
    overwritten while this stream still copies from it.
    """
    for block in blocks:
        if block.is_cuda:
            block.record_stream(torch.cuda.current_stream(block.device))


def _bits_of(tensor: torch.Tensor) -> npt.NDArray[Any]:
    return tensor.detach().view(_BITS[tensor.element_size()]).numpy()  # NumPy has no bfloat16
