"""The disk tier: records of equal length in slots of a temporary file."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from memlong.bank.forks import fork_lock
from memlong.bank.store.offsets import read_at, write_at
from memlong.errors import StorageError


class DiskSlots:
    """Slots of equal size in one file.

    The file has no name in the folder (on Windows, it is deleted when closed), so nothing is left behind however the
    process ends. It is read and written rather than memory-mapped: its content never counts as resident memory, and a
    full disk is an error that can be caught instead of a signal that kills the process.

    The file belongs to the process that created it. A forked process may read the slots of that time until the owner
    releases one, which may then hold something else: from then on, reading is refused.

    Parameters
    ----------
    folder : Path
        Folder of the file; it must exist.
    slot_bytes : int
        Size of a slot.

    Raises
    ------
    StorageError
        If no file can be created there.
    """

    def __init__(self, folder: Path, slot_bytes: int) -> None:
        self._folder = folder
        self._size = slot_bytes
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - as long as this object
        except OSError as error:
            raise StorageError(
                f"The disk tier cannot write to the folder {str(folder)!r}: {error.strerror}. Create it, or name "
                "another"
            ) from error
        self._close = weakref.finalize(self, self._file.close)
        self._owner = os.getpid()
        self._given_back, self._given_back_by_owner = (
            0,
            mmap.mmap(-1, 8),
        )  # the latter is shared by all processes
        self._free: set[int] = set()
        self._end = 0
        self._lock = fork_lock()

    @property
    def is_ours(self) -> bool:
        """Whether this process created the file and so may write to it."""
        return os.getpid() == self._owner

    def write(self, records: Iterable[torch.Tensor]) -> list[int]:
        """Store records, each uint8 [slot_bytes] on the CPU, and return their slots; on an error, none is stored."""
        slots = []
        with self._lock:
            try:
                for record in records:
                    slots.append(self._free.pop() if self._free else self._end)
                    self._end = max(self._end, slots[-1] + 1)
                    self._write_at(slots[-1], record.numpy())
            except BaseException as error:
                self._free.update(slots)
                with suppress(OSError):  # report the first error; free slots are reused
                    self._shrink()
                if isinstance(error, OSError):
                    raise StorageError(
                        f"The disk tier in {str(self._folder)!r} cannot take another {self._size:,} bytes: "
                        f"{error.strerror}. Nothing was stored. Free some space, name another folder, or set "
                        "disk_budget"
                    ) from error
                raise
        return slots

    def read_into(self, slot: int, target: torch.Tensor) -> None:
        """Read a record into a tensor, uint8 [slot_bytes] on the CPU.

        Raises
        ------
        StorageError
            If the file cannot be read, or may have changed since the fork.
        """
        with self._lock:
            self._read_at(slot, target.numpy())

    def release(self, slots: list[int]) -> None:
        """Free slots; if the file cannot be truncated, StorageError is raised and all are still in use."""
        with self._lock:
            self._note_given_back()
            self._free.update(slots)
            try:
                self._shrink()
            except OSError as error:
                self._free.difference_update(slots)
                raise StorageError(
                    f"The disk tier in {str(self._folder)!r} cannot give space back: {error.strerror or error}. "
                    "Nothing was removed. Try again, or name another folder"
                ) from error

    def keep_only(self, slots: Iterable[int]) -> None:
        """Free all other slots, after an interrupt that left unclear which are in use."""
        with self._lock:
            self._note_given_back()
            self._free = set(range(self._end)).difference(slots)
            with suppress(OSError):  # free slots that stay in the file are reused
                self._shrink()

    def close(self) -> None:
        """Delete the file, as happens when this object is garbage-collected."""
        self._close()

    def _write_at(self, slot: int, record: np.ndarray) -> None:
        write_at(self._file, slot * self._size, record.data)

    def _read_at(self, slot: int, target: np.ndarray) -> None:
        try:
            missing = read_at(self._file, slot * self._size, target.data)
        except OSError as error:
            raise StorageError(
                f"The disk tier in {str(self._folder)!r} cannot be read: {error.strerror or error}. Check the disk; "
                "a memory kept on another (disk=...) starts empty"
            ) from error
        if not self.is_ours and self._shared_count() != self._given_back:
            raise StorageError(
                f"The disk tier in {str(self._folder)!r} belongs to process {self._owner}, from which this one was "
                "forked, and chunks have been removed since: this process could read another chunk's data. Save the "
                "bank before the fork, and load it in each process"
            )
        if missing:
            raise StorageError(f"The disk tier in {str(self._folder)!r} lost data: its file is too short")

    def _note_given_back(self) -> None:
        """Tell forked processes. This comes first, as a slot may hold something else from here on."""
        count = self._given_back + 1
        self._given_back_by_owner[:] = count.to_bytes(8, "little")
        self._given_back = count

    def _shared_count(self) -> int:
        return int.from_bytes(self._given_back_by_owner[:], "little")

    def _shrink(self) -> None:
        """Truncate the free slots at the end of the file."""
        end = self._end
        while end - 1 in self._free:
            end -= 1
        if end < self._end:
            self._file.truncate(end * self._size)
            self._end = end
            self._free = {slot for slot in self._free if slot < end}
