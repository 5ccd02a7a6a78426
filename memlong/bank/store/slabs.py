"""Page-locked host memory for copies to and from a CUDA device, in slabs that are divided into slots for records."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice

import torch

from memlong.bank.store.traffic import Traffic, note
from memlong.errors import StorageError

_SLAB_BYTES = 256 << 20


class Slot:
    """Memory for one record, freed as soon as nothing refers to this object.

    So an interrupt cannot leak a slot, and a record that is still to be read is never overwritten.

    Attributes
    ----------
    record : torch.Tensor
        uint8 [bytes], page-locked.
    traffic : Traffic
        The copies from and to it.
    """

    __slots__ = ("__weakref__", "record", "traffic")

    def __init__(self, record: torch.Tensor, traffic: Traffic) -> None:
        self.record = record
        self.traffic = traffic


class Slabs:
    """Slots of equal size in page-locked memory, for one user at a time.

    Page-locking is slow, and torch rounds each allocation up to a power of two. So there are few slabs, each as large
    as all previous ones together (up to 256 MB), and using the whole power of two. Slabs with only free slots are
    released, except one.

    Parameters
    ----------
    record_bytes : int
        Size of a slot.
    device : torch.device
        The CUDA device that copies.
    budget : int, optional
        Maximum bytes of records; exceeded only while more slots are in use.
    """

    def __init__(self, record_bytes: int, device: torch.device, budget: int | None = None) -> None:
        self._size = record_bytes
        self._device = device
        self._most = None if budget is None else budget // max(record_bytes, 1)
        self._slabs: list[_Slab] = []
        self._ended: deque[_Lease] = deque()

    @property
    def nbytes(self) -> int:
        """Bytes of page-locked memory."""
        return sum(slab.memory.nbytes for slab in self._slabs)

    def bring(self, records: Sequence[torch.Tensor]) -> list[Slot]:
        """Copy records [bytes] from the device to new slots, without blocking the host.

        The current stream copies. To read a slot afterward, use `send` or `settle`, which wait for the copy.
        """
        slots = self.take(len(records))
        stream = torch.cuda.current_stream(self._device)
        for slot in slots:
            slot.traffic.hold_back(stream, writing=True)
        try:
            for slot, record in zip(slots, records, strict=True):
                slot.record.copy_(record, non_blocking=True)
        finally:
            note([slot.traffic for slot in slots], stream, writing=True)
        return slots

    def send(self, slots: Sequence[Slot]) -> list[torch.Tensor]:
        """Copy records to the device on the current stream, once they are complete, without blocking the host."""
        stream = torch.cuda.current_stream(self._device)
        for slot in slots:
            slot.traffic.hold_back(stream, writing=False)
        try:
            return [slot.record.to(self._device, non_blocking=True) for slot in slots]
        finally:
            note([slot.traffic for slot in slots], stream, writing=False)

    def settle(self, slots: Iterable[Slot], *, writing: bool = False) -> None:
        """Block the host until it may read slots, or write to them."""
        for slot in slots:
            slot.traffic.wait(writing=writing)

    def take(self, count: int) -> list[Slot]:
        """Return free slots; a device may still be copying from and to them.

        Raises
        ------
        StorageError
            If no more page-locked memory can be allocated.
        """
        self._collect()
        missing = count - sum(len(slab.free) for slab in self._slabs)
        if missing > 0:
            self._grow(missing)
        slots: list[Slot] = []
        for slab in self._slabs:
            slots += [self._taken(slab, row) for row in list(islice(slab.free, count - len(slots)))]
        return slots

    def tidy(self) -> None:
        """Release slabs that are entirely free, except the smallest."""
        self._collect()
        idle = [slab for slab in self._slabs if len(slab.free) == len(slab.traffic)]
        keep = min(idle, key=lambda slab: slab.memory.nbytes, default=None)
        # No need to wait for pending copies: torch reuses the memory only after they are done.
        self._slabs = [slab for slab in self._slabs if slab is keep or slab not in idle]

    def _taken(self, slab: _Slab, row: int) -> Slot:
        slot = Slot(slab.memory[row], slab.traffic[row])
        lease = _Lease(slot, self._ended.append)
        lease.slab, lease.row = slab, row
        slab.leases[row] = lease
        del slab.free[row]  # last: an interrupt before this ends the lease, which then has no effect
        return slot

    def _collect(self) -> None:
        """Mark slots of ended leases as free; after an interrupt, each step may safely be repeated."""
        while self._ended:
            lease = self._ended[0]
            slab, row = lease.slab, lease.row
            if slab is not None and slab.leases.get(row) is lease:
                slab.free[row] = None
                del slab.leases[row]
            self._ended.popleft()

    def _grow(self, missing: int) -> None:
        have = sum(len(slab.traffic) for slab in self._slabs)
        count = max(missing, min(have, _SLAB_BYTES // max(self._size, 1)))
        if self._most is not None:
            count = max(missing, min(count, self._most - have))
        rounded = (1 << (count * self._size - 1).bit_length()) // self._size if self._size else count
        if self._most is None or have + rounded <= self._most:
            count = rounded
        self._slabs.append(_Slab(page_locked(count, self._size)))


class _Slab:
    """One allocation, and its free rows, those free the longest first."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.free: dict[int, None] = dict.fromkeys(range(len(memory)))
        self.leases: dict[int, _Lease] = {}
        self.traffic = [Traffic() for _ in range(len(memory))]


class _Lease(weakref.ref[Slot]):
    """Reports the end of a slot, with a callback that is not Python code, which an interrupt could break off."""

    slab: _Slab | None = None
    row = 0


def page_locked(count: int, size: int) -> torch.Tensor:
    """Return uint8 [count, size] in page-locked host memory; StorageError if it cannot be allocated."""
    try:
        with torch.inference_mode(False):
            return torch.empty(count, size, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:
        raise StorageError(
            f"The host tier cannot get another {count * size:,} bytes of page-locked memory ({error}). Nothing was "
            "stored. Set a smaller budget (host=...), or add a disk tier"
        ) from error
