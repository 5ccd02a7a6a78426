"""The disk tier: records of one length in slots of a file that leaves nothing behind."""

from __future__ import annotations

import tempfile
import threading
import weakref
from pathlib import Path

import numpy as np
import torch

from memlong.errors import StorageError


class DiskSlots:
    """Slots of equal size in one file.

    The file has no name in the folder (or loses it when closed, on Windows), so that nothing is left behind however the
    process ends. It is read and written rather than mapped into memory: what lies on disk then never counts as resident
    memory, and a full disk is an error that can be caught instead of a signal that kills the process.

    Parameters
    ----------
    folder : Path
        Where the file is made; it must exist.
    slot_bytes : int
        Size of a slot.

    Raises
    ------
    StorageError
        If no file can be made there.
    """

    def __init__(self, folder: Path, slot_bytes: int) -> None:
        self._folder = folder
        self._size = slot_bytes
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - as long as this object
        except OSError as error:
            raise StorageError(
                f"The disk tier cannot write to the folder {str(folder)!r}: {error.strerror}. Create it, or name "
                "another."
            ) from error
        self._close = weakref.finalize(self, self._file.close)
        self._free: set[int] = set()
        self._end = 0
        self._lock = threading.Lock()

    def write(self, records: torch.Tensor) -> list[int]:
        """Store records [n, slot_bytes], uint8 on the CPU, and return their slots; if this raises, none is stored."""
        slots = []
        with self._lock:
            try:
                for record in records.numpy():
                    slots.append(self._free.pop() if self._free else self._end)
                    self._end = max(self._end, slots[-1] + 1)
                    self._write_at(slots[-1], record)
            except BaseException as error:
                self._free.update(slots)
                self._shrink()
                if isinstance(error, OSError):
                    raise StorageError(
                        f"The disk tier in {str(self._folder)!r} cannot take another {self._size:,} bytes: "
                        f"{error.strerror}. Nothing was stored. Free some space, name another folder, or set "
                        "disk_budget."
                    ) from error
                raise
        return slots

    def read(self, slots: list[int]) -> torch.Tensor:
        """Return the records [n, slot_bytes], uint8."""
        records = torch.empty(len(slots), self._size, dtype=torch.uint8)
        for slot, target in zip(slots, records.numpy(), strict=True):
            with self._lock:
                self._file.seek(slot * self._size)
                self._fill(target)
        return records

    def release(self, slots: list[int]) -> None:
        """Give slots back."""
        with self._lock:
            self._free.update(slots)
            self._shrink()

    def close(self) -> None:
        """Give everything back, as the end of this object does."""
        self._close()

    def _write_at(self, slot: int, record: np.ndarray) -> None:
        self._file.seek(slot * self._size)
        rest = record.data
        while rest:
            rest = rest[self._file.write(rest) :]

    def _fill(self, target: np.ndarray) -> None:
        rest = target.data
        while rest:
            count = self._file.readinto(rest)
            if not count:
                raise StorageError(
                    f"The disk tier in {str(self._folder)!r} lost data: its file is too short."
                )
            rest = rest[count:]

    def _shrink(self) -> None:
        """Give the free slots at the end of the file back to the disk."""
        end = self._end
        while end and end - 1 in self._free:
            end -= 1
            self._free.remove(end)
        if end < self._end:
            self._end = end
            self._file.truncate(end * self._size)
