"""The disk tier: records of one length in slots of a file that leaves nothing behind."""

from __future__ import annotations

import tempfile
import threading
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
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

    def write(self, records: Iterable[torch.Tensor]) -> list[int]:
        """Store records, each uint8 [slot_bytes] on the CPU, and return their slots; if this raises, none is stored."""
        slots = []
        with self._lock:
            try:
                for record in records:
                    slots.append(self._free.pop() if self._free else self._end)
                    self._end = max(self._end, slots[-1] + 1)
                    self._write_at(slots[-1], record.numpy())
            except BaseException as error:
                self._free.update(slots)
                with suppress(OSError):  # the first error is the one to tell, and free slots are used again
                    self._shrink()
                if isinstance(error, OSError):
                    raise StorageError(
                        f"The disk tier in {str(self._folder)!r} cannot take another {self._size:,} bytes: "
                        f"{error.strerror}. Nothing was stored. Free some space, name another folder, or set "
                        "disk_budget."
                    ) from error
                raise
        return slots

    def read(self, slots: Sequence[int]) -> list[torch.Tensor]:
        """Return the records, each uint8 [slot_bytes] in memory of its own; StorageError if the file cannot be read."""
        records = [torch.empty(self._size, dtype=torch.uint8, device="cpu") for _ in slots]
        self.read_into(slots, records)
        return records

    def read_into(self, slots: Sequence[int], targets: Sequence[torch.Tensor]) -> None:
        """Read each record into a tensor, uint8 [slot_bytes] on the CPU; StorageError if the file cannot be read."""
        for slot, target in zip(slots, targets, strict=True):
            with self._lock:
                self._read_at(slot, target.numpy())

    def release(self, slots: list[int]) -> None:
        """Give slots back; if this raises StorageError, because the file cannot be cut, they are all still there."""
        with self._lock:
            self._free.update(slots)
            try:
                self._shrink()
            except OSError as error:
                self._free.difference_update(slots)
                raise StorageError(
                    f"The disk tier in {str(self._folder)!r} cannot give space back: {error.strerror or error}. "
                    "Nothing was removed. Try again, or name another folder."
                ) from error

    def keep_only(self, slots: Iterable[int]) -> None:
        """Give all other slots back, where an interrupt has left it open which are in use."""
        with self._lock:
            self._free = set(range(self._end)).difference(slots)
            with suppress(OSError):  # free slots that stay in the file are used again
                self._shrink()

    def close(self) -> None:
        """Give everything back, as the end of this object does."""
        self._close()

    def _write_at(self, slot: int, record: np.ndarray) -> None:
        self._file.seek(slot * self._size)
        rest = record.data
        while rest:
            rest = rest[self._file.write(rest) :]

    def _read_at(self, slot: int, target: np.ndarray) -> None:
        rest = target.data
        try:
            self._file.seek(slot * self._size)
            while rest and (count := self._file.readinto(rest)):
                rest = rest[count:]
        except OSError as error:
            raise StorageError(
                f"The disk tier in {str(self._folder)!r} cannot be read: {error.strerror or error}. Check the disk; "
                "a memory kept on another (disk=...) starts empty."
            ) from error
        if rest:
            raise StorageError(f"The disk tier in {str(self._folder)!r} lost data: its file is too short.")

    def _shrink(self) -> None:
        """Give the free slots at the end of the file back to the disk."""
        end = self._end
        while end - 1 in self._free:
            end -= 1
        if end < self._end:
            self._file.truncate(end * self._size)
            self._end = end
            self._free = {slot for slot in self._free if slot < end}
