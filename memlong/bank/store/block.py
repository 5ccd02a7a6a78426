"""The content of one object: a chunk's record, with what it takes to trust it."""

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
HEAD = struct.Struct("<8sII")  # magic, length of the header, CRC-32 of all that follows
_WIDEST, _LARGEST = 2**20, 2**27  # as in a snapshot
_DTYPES = {str(each): each for each in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


@dataclass(frozen=True)
class BlockKind:
    """What all blocks of one bank have in common.

    Attributes
    ----------
    shape : tuple of int
        (layers, kv_heads, chunk, head_dim).
    dtype : torch.dtype
        Of the keys and values.
    stored : str or None
        The dtype they are stored in, where that is another.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: StorageDtype | None

    @classmethod
    def of(cls, layout: ChunkLayout, stored: StorageDtype | None) -> Self:
        """Return the kind of blocks of a layout."""
        return cls(layout.shape, layout.dtype, stored)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}" + (f" as {self.stored}" if self.stored else "")


def encode(owner: str, chunk_id: int, kind: BlockKind, record: torch.Tensor) -> bytes:
    """Return the content of the object that holds one chunk.

    Parameters
    ----------
    owner : str
        Whose chunk it is, which no other bank at the place is called.
    chunk_id : int
        Its id there.
    kind : BlockKind
        Of the block.
    record : torch.Tensor
        uint8 [bytes] on the CPU.
    """
    facts = {"owner": owner, "chunk": chunk_id, "dtype": str(kind.dtype), "shape": list(kind.shape)}
    header = json.dumps({**facts, "stored": kind.stored}).encode()
    header += b" " * (-(HEAD.size + len(header)) % 64)
    body = b"".join((header, record.contiguous().numpy().data))
    return HEAD.pack(MAGIC, len(header), zlib.crc32(body)) + body


def decode(content: bytes, owner: str, chunk_id: int, kind: BlockKind, record: torch.Tensor) -> None:
    """Read the record in an object into a tensor, uint8 [bytes] on the CPU.

    Raises
    ------
    ValueError
        If the content is damaged, of another chunk or of another kind; the message says how it shows.
    """
    found, start = _opened(content, owner, chunk_id)
    if found != kind:
        raise ValueError(f"it is of {found}, not {kind}")
    if len(content) - start != len(record):
        raise ValueError(f"it has {len(content) - start:,} bytes of {len(record):,}")
    record.numpy()[:] = np.frombuffer(content, dtype=np.uint8, offset=start)


def kind_of(content: bytes, owner: str, chunk_id: int) -> BlockKind:
    """Return the kind of the block in an object; raises as `decode` does."""
    return _opened(content, owner, chunk_id)[0]


def _opened(content: bytes, owner: str, chunk_id: int) -> tuple[BlockKind, int]:
    """Return the kind of a block, and where its record begins."""
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
        raise ValueError("its header is none of a chunk")
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
