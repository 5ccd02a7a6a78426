"""The content of one object: a chunk's keys and values as bytes, with what it takes to trust them."""

from __future__ import annotations

import json
import math
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from memlong.bank import ChunkLayout

Bytes = npt.NDArray[np.uint8]

_MAGIC = b"memlong\x01"
_HEAD = struct.Struct("<8sII")  # magic, length of the header, CRC-32 of all that follows
_WIDEST, _LARGEST = 2**20, 2**27  # as in a snapshot
_DTYPES = {str(each): each for each in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def encode(session: str, chunk_id: int, keys: torch.Tensor, values: torch.Tensor) -> bytes:
    """Return the content of the object that holds one chunk.

    Parameters
    ----------
    session : str
        Key of the session that the chunk is of.
    chunk_id : int
        Its id there.
    keys, values : torch.Tensor
        [layers, kv_heads, chunk, head_dim], any strides and device.
    """
    header = json.dumps(
        {"session": session, "chunk": chunk_id, "dtype": str(keys.dtype), "shape": list(keys.shape)}
    ).encode()
    header += b" " * (-(_HEAD.size + len(header)) % 64)
    body = b"".join((header, _bytes_of(keys).data, _bytes_of(values).data))
    return _HEAD.pack(_MAGIC, len(header), zlib.crc32(body)) + body


def decode(content: bytes, session: str, chunk_id: int, layout: ChunkLayout) -> tuple[Bytes, Bytes]:
    """Return the bytes of the keys and of the values in an object, as views of it.

    Raises
    ------
    ValueError
        If the content is damaged, of another chunk or of another layout; the message says how it shows.
    """
    header, start = _header(content, session, chunk_id)
    found = header.get("dtype"), tuple(header["shape"])
    if found != (str(layout.dtype), layout.shape):
        raise ValueError(f"it is of {found[0]} {list(found[1])}, not {layout.dtype} {list(layout.shape)}")
    if len(content) - start != layout.nbytes:
        raise ValueError(f"it has {len(content) - start:,} bytes of {layout.nbytes:,}")
    keys, values = np.frombuffer(content, dtype=np.uint8, offset=start).reshape(2, -1)
    return keys, values


def layout_of(content: bytes, session: str, chunk_id: int) -> ChunkLayout:
    """Return shape and dtype of the chunk in an object; raises as `decode` does."""
    header, _ = _header(content, session, chunk_id)
    dtype = _DTYPES.get(str(header.get("dtype")))
    if dtype is None:
        raise ValueError(f"its dtype is {header.get('dtype')!r:.50}")
    return ChunkLayout(tuple(header["shape"]), dtype, torch.device("cpu"))


def _header(content: bytes, session: str, chunk_id: int) -> tuple[dict[str, Any], int]:
    if len(content) < _HEAD.size:
        raise ValueError(f"it is cut off after {len(content)} bytes")
    magic, length, checksum = _HEAD.unpack_from(content)
    if magic != _MAGIC:
        raise ValueError("it does not begin as a chunk does")
    if zlib.crc32(memoryview(content)[_HEAD.size :]) != checksum:
        raise ValueError("its checksum differs")
    start = _HEAD.size + length
    try:
        header = json.loads(content[_HEAD.size : start])
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(header, dict) or not _is_shape(header.get("shape")):
        raise ValueError("its header is none of a chunk")
    if (header.get("session"), header.get("chunk")) != (session, chunk_id):
        raise ValueError(f"it is chunk {header.get('chunk')!r:.50} of session {header.get('session')!r:.50}")
    return header, start


def _is_shape(shape: object) -> bool:
    sizes = shape if isinstance(shape, list) else []
    whole = len(sizes) == 4 and all(type(each) is int and 1 <= each <= _WIDEST for each in sizes)
    return whole and math.prod(sizes) <= _LARGEST


def _bytes_of(states: torch.Tensor) -> Bytes:
    found: Bytes = states.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return found
