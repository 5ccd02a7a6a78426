"""All embeddings of a bank in one file, which processes that load it map, and so have in memory once."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from memlong.bank.arrays import Floats
from memlong.bank.snapshot.files import FileRecord, damaged, open_plain, unreadable
from memlong.bank.snapshot.writer import SnapshotWriter

_WORTH = 8 << 20  # bytes, below which each process has its own


def write_matrix(writer: SnapshotWriter, embeddings: Floats) -> FileRecord | None:
    """Write embeddings [n, dim] if they are large."""
    if embeddings.nbytes < _WORTH:
        return None
    return writer.write("matrix", np.ascontiguousarray(embeddings, dtype="<f4"), "bin")


def map_matrix(folder: Path, record: FileRecord, embeddings: Floats) -> Floats:
    """Return the file as an array equal to ``embeddings`` [n, dim], which were checked; writing makes copies of pages.

    Raises
    ------
    SnapshotError
        If it holds something else.
    """
    path = folder / record.name
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != embeddings.nbytes or size != record.nbytes:
            raise damaged(path, f"has {size:,} bytes instead of {embeddings.nbytes:,}")
        try:
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise unreadable(path, error) from error
    found: Floats = np.frombuffer(mapped, dtype="<f4").reshape(embeddings.shape)
    if not np.array_equal(found, embeddings):
        raise damaged(path, "does not hold the embeddings of the chunks")
    return found
