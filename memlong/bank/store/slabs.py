"""Page-locked memory of the host, in slabs cut into slots for records: what a CUDA device copies to and from."""

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
    """A place for one record; free again as soon as nobody refers to this object.

    So an interrupt cannot lose one, and nothing is written over what somebody still means to read.

    Attributes
    ----------
    record : torch.Tensor
        uint8 [bytes], page-locked.
    traffic : Traffic
        What copies from and to it.
    """

    __slots__ = ("__weakref__", "record", "traffic")

    def __init__(self, record: torch.Tensor, traffic: Traffic) -> None:
        self.record = record
        self.traffic = traffic


class Slabs:
    """Slots of one size, all in page-locked memory, for one user at a time.

    Page-locking is slow, and torch rounds each piece of such memory up to a power of two: so there are few, each as
    large as all before it together, up to 256 MB, and filled to that power. A slab is given back when its slots are
    free, but for one.

    Parameters
    ----------
    record_bytes : int
        Size of a slot.
    device : torch.device
        The CUDA device that copies.
    budget : int, optional
        Bytes of records that are wanted at most; there are more slots only while more are in use.
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
        """Copy records [bytes] of the device to slots of their own; the host does not wait.

        The current stream copies. Whoever reads a slot afterwards waits for it: by `send` or `settle`.
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
        """Copy records to the device; the host does not wait, and the current stream copies once they are there."""
        stream = torch.cuda.current_stream(self._device)
        for slot in slots:
            slot.traffic.hold_back(stream, writing=False)
        try:
            return [slot.record.to(self._device, non_blocking=True) for slot in slots]
        finally:
            note([slot.traffic for slot in slots], stream, writing=False)

    def settle(self, slots: Iterable[Slot], *, writing: bool = False) -> None:
        """Have the host wait until it may read slots, or write to them."""
        for slot in slots:
            slot.traffic.wait(writing=writing)

    def take(self, count: int) -> list[Slot]:
        """Return slots that nobody uses; a device may still be copying from and to them.

        Raises
        ------
        StorageError
            If there is no more page-locked memory.
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
        """Give slabs back that are free, but for the smallest."""
        self._collect()
        idle = [slab for slab in self._slabs if len(slab.free) == len(slab.traffic)]
        keep = min(idle, key=lambda slab: slab.memory.nbytes, default=None)
        # Copies under way are no reason to wait: torch hands such memory out again only when they are done.
        self._slabs = [slab for slab in self._slabs if slab is keep or slab not in idle]

    def _taken(self, slab: _Slab, row: int) -> Slot:
        slot = Slot(slab.memory[row], slab.traffic[row])
        lease = _Lease(slot, self._ended.append)
        lease.slab, lease.row = slab, row
        slab.leases[row] = lease
        del slab.free[row]  # last: an interrupt before this ends the lease, which changes nothing then
        return slot

    def _collect(self) -> None:
        """Note what is free again; each step may be taken twice, should an interrupt come between."""
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
    """One piece of memory, and which of its rows are free, those that have been for longest first."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.free: dict[int, None] = dict.fromkeys(range(len(memory)))
        self.leases: dict[int, _Lease] = {}
        self.traffic = [Traffic() for _ in range(len(memory))]


class _Lease(weakref.ref[Slot]):
    """Tells when a slot has ended, by a call into no Python code: that could be interrupted."""

    slab: _Slab | None = None
    row = 0


def page_locked(count: int, size: int) -> torch.Tensor:
    """Return uint8 [count, size] in page-locked memory of the host; StorageError if there is none."""
    try:
        with torch.inference_mode(False):
            return torch.empty(count, size, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:
        raise StorageError(
            f"The host tier cannot get another {count * size:,} bytes of page-locked memory ({error}). Nothing was "
            "stored. Set a smaller budget (host=...), or add a disk tier"
        ) from error
