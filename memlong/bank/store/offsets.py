"""Read and write a file at offsets, without its position, which forked processes share."""

from __future__ import annotations

import os
import sys
from io import FileIO


def read_at(file: FileIO, offset: int, target: memoryview) -> int:
    """Fill a buffer from an offset, and return the number of bytes that are missing because the file ends early."""
    rest = target
    while rest and (count := _read(file, offset, rest)):
        rest, offset = rest[count:], offset + count
    return len(rest)


def write_at(file: FileIO, offset: int, content: memoryview) -> None:
    """Write bytes at an offset."""
    rest = content
    while rest:
        count = _write(file, offset, rest)
        rest, offset = rest[count:], offset + count


if sys.platform == "win32":  # no forks and no such calls; callers hold a lock

    def _read(file: FileIO, offset: int, target: memoryview) -> int:
        file.seek(offset)
        return file.readinto(target) or 0

    def _write(file: FileIO, offset: int, content: memoryview) -> int:
        file.seek(offset)
        return file.write(content)

else:

    def _read(file: FileIO, offset: int, target: memoryview) -> int:
        return os.preadv(file.fileno(), [target], offset)

    def _write(file: FileIO, offset: int, content: memoryview) -> int:
        return os.pwrite(file.fileno(), content, offset)
