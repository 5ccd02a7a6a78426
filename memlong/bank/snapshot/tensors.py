"""Tensors in safetensors files: small sets of them at once, and one long row of blocks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError

from memlong.bank.layout import ChunkLayout
from memlong.bank.snapshot.files import FileRecord, damaged, read_checked
from memlong.errors import InvalidArgumentError

Arrays = dict[str, npt.NDArray[Any]]
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""By name, the NumPy dtype and the shape that an array must have."""

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""Dtypes of keys and values, as torch and as safetensors names them."""

_HEADER_ROOM = 4096
_LONGEST_HEADER = 8 << 20  # some 80,000 tensors, which take a second to be told apart


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype of keys and values; InvalidArgumentError if a file cannot hold it."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InvalidArgumentError(
            f"keys and values are {name}, which a snapshot cannot hold; it can hold {', '.join(DTYPES)}"
        )
    return name


def encode(arrays: Arrays) -> bytes:
    """Return the content of a safetensors file."""
    return safetensors.numpy.save(arrays)


def read_arrays(folder: Path, record: FileRecord, shapes: Shapes) -> Arrays:
    """Read a proven file of these very arrays.

    Raises
    ------
    SnapshotError
        If it is not what was saved, or holds something else.
    """
    path = folder / record.name
    needed = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in shapes.values())
    if not needed <= record.nbytes <= needed + _HEADER_ROOM:  # before anything of that size is read
        raise damaged(path, f"is said to have {record.nbytes:,} bytes, but its content takes {needed:,}")
    try:
        arrays: Arrays = safetensors.numpy.load(read_checked(folder, record))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, f"is not a safetensors file ({error})") from error
    if arrays.keys() != shapes.keys():
        raise damaged(path, f"holds {', '.join(sorted(arrays))} instead of {', '.join(sorted(shapes))}")
    for name, (dtype, shape) in shapes.items():
        found = arrays[name]
        if found.dtype != dtype or found.shape != shape:
            raise damaged(
                path, f"holds {name} of {found.dtype}{list(found.shape)} instead of {dtype}{list(shape)}"
            )
    return arrays


def read_streams(folder: Path, record: FileRecord) -> dict[str, torch.Tensor]:
    """Read a proven file of tensors of any names and shapes; SnapshotError if it is none."""
    path, content = folder / record.name, read_checked(folder, record)
    if has_long_header(content):
        raise damaged(path, "says more of its tensors than such a file ever does")
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise damaged(path, f"is not a safetensors file ({error})") from error


def has_long_header(start: bytes) -> bool:
    """Whether a safetensors file that begins so describes more tensors than any that memlong or peft writes."""
    return int.from_bytes(start[:8], "little") > _LONGEST_HEADER


def blocks_header(layout: ChunkLayout, count: int) -> bytes:
    """Return what precedes the blocks in their file: one tensor ``key_values`` [count, 2, *layout.shape]."""
    entry = {
        "dtype": DTYPES[dtype_name(layout.dtype)],
        "shape": [count, 2, *layout.shape],
        "data_offsets": [0, count * layout.nbytes],
    }
    text = json.dumps({"key_values": entry}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(states: torch.Tensor) -> memoryview:
    """Look at a contiguous tensor of the CPU as bytes."""
    return states.detach().view(-1).view(torch.uint8).numpy().data
