"""The format of an object: a chunk's record, with a checksum and a header that says whose it is."""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from memlong.bank.layout import ChunkLayout
from memlong.bank.store.codec import StorageDtype

MAGIC = b"memlong\x01"
HEAD = struct.Struct("<8sII")  # magic, header length, CRC-32 of everything after it
_WIDEST, _LARGEST = 2**20, 2**27  # same limits as in a snapshot
_DTYPES = {str(each): each for each in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


@dataclass(frozen=True)
class BlockKind:
    """What all blocks of one bank have in common.

    Attributes
    ----------
    shape : tuple of int
        (layers, kv_heads, chunk, head_dim).
    dtype : torch.dtype
        Dtype of the keys and values.
    stored : str or None
        Dtype they are stored in, if different.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: StorageDtype | None

    @classmethod
    def of(cls, layout: ChunkLayout, stored: StorageDtype | None) -> Self:
        """Return the kind of a layout's blocks."""
        return cls(layout.shape, layout.dtype, stored)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}" + (f" as {self.stored}" if self.stored else "")


def encode(owner: str, chunk_id: int, kind: BlockKind, record: torch.Tensor) -> bytes:
    """Return the content of a chunk's object.

    Parameters
    ----------
    owner : str
        Name of the chunk's bank, unique in its place.
    chunk_id : int
        The chunk's id in that bank.
    kind : BlockKind
        Kind of the block.
    record : torch.Tensor
        uint8 [bytes] on the CPU.
    """
    facts = {"owner": owner, "chunk": chunk_id, "dtype": str(kind.dtype), "shape": list(kind.shape)}
    header = json.dumps({**facts, "stored": kind.stored}).encode()
    header += b" " * (-(HEAD.size + len(header)) % 64)
    body = b"".join((header, record.contiguous().numpy().data))
    return HEAD.pack(MAGIC, len(header), zlib.crc32(body)) + body


def decode(content: bytes, owner: str, chunk_id: int, kind: BlockKind, record: torch.Tensor) -> None:
    """Copy the record from an object's content into a tensor, uint8 [bytes] on the CPU.

    Raises
    ------
    ValueError
        If the content is damaged, or belongs to another chunk or another kind; the message says which.
    """
    found, start = _opened(content, owner, chunk_id)
    if found != kind:
        raise ValueError(f"it holds {found}, not {kind}")
    if len(content) - start != len(record):
        raise ValueError(f"it has {len(content) - start:,} bytes instead of {len(record):,}")
    record.numpy()[:] = np.frombuffer(content, dtype=np.uint8, offset=start)


def kind_of(content: bytes, owner: str, chunk_id: int) -> BlockKind:
    """Return the kind of the block in an object's content; raises like `decode`."""
    return _opened(content, owner, chunk_id)[0]


def _opened(content: bytes, owner: str, chunk_id: int) -> tuple[BlockKind, int]:
    """Return the kind of a block, and the offset of its record."""
    if len(content) < HEAD.size:
        raise ValueError(f"it is cut off after {len(content)} bytes")
    magic, length, checksum = HEAD.unpack_from(content)
    if magic != MAGIC:
        raise ValueError("it does not begin as a chunk does")
    if zlib.crc32(memoryview(content)[HEAD.size :]) != checksum:
        raise ValueError("its checksum differs")
    start = HEAD.size + length
    try:
        header = json.loads(content[HEAD.size : start])
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(header, dict) or not _is_shape(header.get("shape")):
        raise ValueError("its header is not that of a chunk")
    if (header.get("owner"), header.get("chunk")) != (owner, chunk_id):
        raise ValueError(f"it is chunk {header.get('chunk')!r:.50} of {header.get('owner')!r:.50}")
    dtype, stored = _DTYPES.get(str(header.get("dtype"))), header.get("stored")
    if dtype is None or stored not in (None, "bfloat16", "float8", "int8"):
        raise ValueError(f"its dtype is {header.get('dtype')!r:.50}, stored as {stored!r:.50}")
    return BlockKind(tuple(header["shape"]), dtype, stored), start


def _is_shape(shape: Any) -> bool:
    sizes = shape if isinstance(shape, list) else []
    whole = len(sizes) == 4 and all(type(each) is int and 1 <= each <= _WIDEST for each in sizes)
    return whole and math.prod(sizes) <= _LARGEST
