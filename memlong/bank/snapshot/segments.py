"""Segments: chunks that were saved together, never changed afterwards, dropped or rewritten as a whole."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from memlong.bank.arrays import Ids
from memlong.bank.layout import ChunkLayout
from memlong.bank.snapshot.content import Content, check_chunks
from memlong.bank.snapshot.files import CheckedFile, damaged
from memlong.bank.snapshot.manifest import BankRecord, SegmentRecord
from memlong.bank.snapshot.tensors import Arrays, blocks_header, bytes_of, encode, read_arrays
from memlong.bank.snapshot.writer import SnapshotWriter
from memlong.bank.store.store import KeyValueStore

_SEGMENT_BYTES = 256 << 20
_BATCH_BYTES = 1 << 20  # so that a block of usual size is read into memory of its own, and stays there
_MOST_SMALL = 32
# Of each dtype: its bits as an integer, and the exponent of what is not finite, where the sign is shifted out.
_EXPONENTS: dict[torch.dtype, tuple[type[np.unsignedinteger[Any]], int]] = {
    torch.float16: (np.uint16, 0xF800),
    torch.bfloat16: (np.uint16, 0xFF00),
    torch.float32: (np.uint32, 0xFF00_0000),
    torch.float64: (np.uint64, 0xFFE0_0000_0000_0000),
}


@dataclass(frozen=True, eq=False)
class StoredSegment:
    """A segment that is on disk, and the ids [n] of its chunks, ascending."""

    record: SegmentRecord
    ids: Ids


@dataclass(frozen=True, eq=False)
class SavedBank:
    """What a state of a folder, which goes by ``token``, holds of a bank."""

    token: str
    record: BankRecord
    segments: tuple[StoredSegment, ...]


@dataclass(frozen=True, eq=False)
class SegmentChunks:
    """What is small of a segment: ids [n], spans [n, 2], embeddings [n, dim], and a CRC-32 [n] of each block."""

    ids: Ids
    spans: Ids
    embeddings: npt.NDArray[np.float32]
    checks: npt.NDArray[np.uint32]


def keepable(segments: Sequence[StoredSegment], living: Ids, chunk_bytes: int) -> list[StoredSegment]:
    """Return the segments that need not be rewritten.

    One more than half of whose chunks have left is not kept; and where there are many small ones, none of these.
    """
    kept = [(each, int(np.isin(each.ids, living).sum())) for each in segments]
    kept = [(each, alive) for each, alive in kept if 2 * alive >= len(each.ids) and alive]
    small_bytes = min(len(living) * chunk_bytes // 16, _SEGMENT_BYTES // 2)
    small = [each for each, alive in kept if alive * chunk_bytes < small_bytes]
    merged = small if len(small) > _MOST_SMALL else []
    return [each for each, _ in kept if each not in merged]


def write_segments(
    writer: SnapshotWriter, content: Content, store: KeyValueStore, layout: ChunkLayout
) -> list[StoredSegment]:
    """Write chunks, all those of a content, into new segments of bounded size."""
    step = max(1, _SEGMENT_BYTES // max(1, layout.nbytes))
    starts = range(0, len(content.ids), step)
    return [
        _write_segment(
            writer, content.rows(np.arange(start, min(start + step, len(content.ids)))), store, layout
        )
        for start in starts
    ]


def _write_segment(
    writer: SnapshotWriter, content: Content, store: KeyValueStore, layout: ChunkLayout
) -> StoredSegment:
    count = len(content.ids)
    checks = []
    with writer.new_file("blocks", "safetensors") as file:
        file.write(blocks_header(layout, count))
        for pair in store.peek(content.ids.tolist()):
            check = 0
            for half in pair:
                part = bytes_of(half.cpu().contiguous())
                check = zlib.crc32(part, check)
                file.write(part)
            checks.append(check)
        blocks = file.record
    arrays: Arrays = {
        "ids": content.ids,
        "spans": content.spans,
        "embeddings": content.embeddings,
        "checks": np.array(checks, dtype=np.uint32),
    }
    chunks = writer.write("chunks", encode(arrays))
    return StoredSegment(SegmentRecord(count, chunks, blocks), content.ids.copy())


def read_chunks(folder: Path, bank: BankRecord, segment: SegmentRecord) -> SegmentChunks:
    """Read what is small of a segment; SnapshotError if it is not what was saved, or cannot be of this bank."""
    count = segment.count
    arrays = read_arrays(
        folder,
        segment.chunks,
        {
            "ids": ("int64", (count,)),
            "spans": ("int64", (count, 2)),
            "embeddings": ("float32", (count, bank.dim)),
            "checks": ("uint32", (count,)),
        },
    )
    found = SegmentChunks(**arrays)
    path = folder / segment.chunks.name
    check_chunks(path, found.ids, found.embeddings, found.spans, unit=bank.metric == "cosine")
    return found


def check_blocks_size(folder: Path, segment: SegmentRecord, layout: ChunkLayout) -> int:
    """Return where the first block lies in its file; SnapshotError if the file is said to have another size."""
    start = len(blocks_header(layout, segment.count))
    if segment.blocks.nbytes != start + segment.count * layout.nbytes:
        raise damaged(
            folder / segment.blocks.name,
            f"is said to have {segment.blocks.nbytes:,} bytes, but {segment.count:,} blocks and what precedes them "
            f"take {start + segment.count * layout.nbytes:,}",
        )
    return start


def read_blocks(
    folder: Path, segment: SegmentRecord, chunks: SegmentChunks, layout: ChunkLayout
) -> Iterator[tuple[Ids, torch.Tensor]]:
    """Read all blocks of a segment, a batch at a time: ids [n] and keys and values [n, 2, *layout.shape] on the CPU.

    They are verified only once the iterator is exhausted; until then, they must not be exposed.

    Raises
    ------
    SnapshotError
        If the file is not what was saved, or holds a number that is not finite.
    """
    header = blocks_header(layout, segment.count)
    check_blocks_size(folder, segment, layout)
    path = folder / segment.blocks.name
    with CheckedFile(folder, segment.blocks) as file:
        if file.read(len(header)) != header:
            raise damaged(path, "does not begin as a file of such blocks does")
        for batch in _batches(list(range(segment.count)), layout):
            records = torch.empty(len(batch), 2, *layout.shape, dtype=layout.dtype, device="cpu")
            file.read_into(bytes_of(records))
            check_finite(path, records)
            yield chunks.ids[batch[0] : batch[-1] + 1], records
        file.finish()


def check_finite(path: Path, states: torch.Tensor) -> None:
    """Raise SnapshotError if a number, on the CPU, is not finite."""
    if states.is_complex():
        raise damaged(path, "holds complex numbers")
    if not states.numel() or not states.is_floating_point():
        return
    if states.dtype in _EXPONENTS:
        # On this thread alone: torch's would spin for a while, and hold up the one that hashes.
        word, exponent = _EXPONENTS[states.dtype]
        bits = np.frombuffer(bytes_of(states.contiguous()), dtype=word)
        finite = bool((bits << word(1)).max() < exponent)  # without the sign
    else:
        finite = bool(torch.isfinite(states.float()).all())
    if not finite:
        raise damaged(path, "holds keys or values that are not finite (NaN or infinite)")


def _batches(ids: list[int], layout: ChunkLayout) -> Iterator[list[int]]:
    step = max(1, _BATCH_BYTES // max(1, layout.nbytes))
    for start in range(0, len(ids), step):
        yield ids[start : start + step]
