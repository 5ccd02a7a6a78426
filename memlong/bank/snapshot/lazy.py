"""SnapshotStore: keys and values that stay in a snapshot's files until they are read."""

from __future__ import annotations

import os
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from memlong.bank.forks import fork_lock
from memlong.bank.layout import ChunkLayout
from memlong.bank.snapshot.files import damaged, open_plain, unreadable
from memlong.bank.snapshot.manifest import SegmentRecord
from memlong.bank.snapshot.segments import (
    SavedBank,
    SegmentChunks,
    check_blocks_size,
    check_finite,
    read_chunks,
)
from memlong.bank.snapshot.tensors import blocks_header, bytes_of
from memlong.bank.store.copying import stack, to_device
from memlong.bank.store.offsets import read_at
from memlong.bank.store.store import InMemoryStore, KeyValueStore
from memlong.errors import InvalidArgumentError


class SnapshotStore(KeyValueStore):
    """Blocks of a snapshot, read on demand, and new blocks in memory.

    A block is checked against its checksum when it is first read. The files stay open, so later saves into the folder
    do no harm: a file that they remove is gone once the last store has closed it.
    """

    def __init__(self) -> None:
        self._new = InMemoryStore()
        self._places: dict[int, tuple[BlocksFile, int]] = {}
        self._files: weakref.WeakSet[BlocksFile] = weakref.WeakSet()

    def attach(self, file: BlocksFile, ids: Sequence[int]) -> None:
        """Add the blocks of a file whose ids are among those given."""
        wanted = set(ids)
        self._files.add(file)
        self._places |= {each: (file, row) for row, each in enumerate(file.ids) if each in wanted}

    def settle(self, folder: Path, saved: SavedBank, layout: ChunkLayout | None) -> None:
        """Read what was saved from its files from now on, in place of memory and of files that are gone."""
        for each in saved.segments:
            path = folder / each.record.blocks.name
            held = [chunk_id for chunk_id in each.ids.tolist() if chunk_id in self]
            moved = [chunk_id for chunk_id in held if not self._is_in(path, chunk_id)]
            if moved and layout is not None:
                chunks = read_chunks(folder, saved.record, each.record)
                self.attach(BlocksFile(folder, each.record, chunks, layout), moved)
                self._new.remove([chunk_id for chunk_id in moved if chunk_id in self._new])

    def _is_in(self, path: Path, chunk_id: int) -> bool:
        place = self._places.get(chunk_id)
        return place is not None and place[0].path == path

    def put(self, ids: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep new blocks in memory."""
        held = [chunk_id for chunk_id in ids if chunk_id in self._places]
        if held:
            raise InvalidArgumentError(f"the store already holds ids {held}; ids are never reused")
        self._new.put(ids, keys, values)

    def get(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return blocks, from files or memory."""
        if not any(chunk_id in self._places for chunk_id in ids):
            return self._new.get(ids)
        pairs = [self._one(chunk_id) for chunk_id in ids]
        return stack([pair[0] for pair in pairs]), stack([pair[1] for pair in pairs])

    def remove(self, ids: Sequence[int]) -> None:
        """Forget blocks; the files stay as they are."""
        unknown = [chunk_id for chunk_id in ids if chunk_id not in self]
        if unknown:
            raise InvalidArgumentError(f"the store holds no block for ids {unknown}")
        for chunk_id in ids:
            if self._places.pop(chunk_id, None) is None and chunk_id in self._new:
                self._new.remove([chunk_id])

    def clear(self) -> None:
        """Forget every block."""
        self._places.clear()
        self._new.clear()

    def __len__(self) -> int:
        return len(self._places) + len(self._new)

    def __contains__(self, chunk_id: object) -> bool:
        return chunk_id in self._places or chunk_id in self._new

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held, on disk and in memory; all blocks have the same size."""
        one = next((file.block_bytes for file in list(self._files)), 0)
        return one * len(self._places) + self._new.nbytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of those in memory."""
        return self._new.nbytes

    @property
    def open_files(self) -> int:
        """How many files with blocks are open."""
        return len(self._files)

    def _one(self, chunk_id: int) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        place = self._places.get(chunk_id)
        if place is not None:
            file, row = place
            return file.read(row)
        keys, values = self._new.get([chunk_id])
        return keys[0], values[0]


class BlocksFile:
    """The open file of a segment's keys and values.

    Parameters
    ----------
    folder : Path
        Folder of the snapshot.
    segment : SegmentRecord
        Which one.
    chunks : SegmentChunks
        Its ids, spans, embeddings and checksums.
    layout : ChunkLayout
        Layout of the blocks, with the device to read them to.

    Attributes
    ----------
    path
        Where it was when it was opened.

    Raises
    ------
    SnapshotError
        If there is no such file, or it has the wrong size or header.
    """

    def __init__(
        self, folder: Path, segment: SegmentRecord, chunks: SegmentChunks, layout: ChunkLayout
    ) -> None:
        self.path = folder / segment.blocks.name
        self._start = check_blocks_size(folder, segment, layout)
        self._layout, self._checks = layout, chunks.checks
        self._file = open_plain(self.path)
        self._close = weakref.finalize(self, self._file.close)
        self._proven: set[int] = set()
        self._lock = fork_lock()
        self.ids: list[int] = chunks.ids.tolist()
        size = os.fstat(self._file.fileno()).st_size
        if size != segment.blocks.nbytes:
            raise damaged(self.path, f"has {size:,} bytes instead of {segment.blocks.nbytes:,}")
        header = blocks_header(layout, segment.count)
        found = bytearray(len(header))
        self._read_at(0, found)
        if found != header:
            raise damaged(self.path, "does not begin as a file of such blocks does")

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self._layout.nbytes

    def read(self, row: int) -> torch.Tensor:
        """Return keys and values [2, *layout.shape] of a row; SnapshotError if they are not what was saved."""
        layout = self._layout
        block = torch.empty(2, *layout.shape, dtype=layout.dtype, device="cpu")
        content = bytes_of(block)
        self._read_at(self._start + row * layout.nbytes, content)
        if row not in self._proven:
            if zlib.crc32(content) != int(self._checks[row]):
                raise damaged(self.path, f"is not what the checksum of block {row} says")
            check_finite(self.path, block)
            self._proven.add(row)
        return to_device(block, layout.device)

    def _read_at(self, offset: int, buffer: bytearray | memoryview) -> None:
        try:
            with self._lock:
                missing = read_at(self._file, offset, memoryview(buffer))
        except OSError as error:
            raise unreadable(self.path, error) from error
        if missing:
            raise damaged(self.path, "is too short")
