"""One tier of a store: records by chunk id, in memory, on disk or as objects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch

from memlong.bank.store.block import BlockKind
from memlong.bank.store.copying import keep_while_read
from memlong.bank.store.disk import DiskSlots
from memlong.bank.store.folder import ObjectFolder
from memlong.bank.store.records import Records
from memlong.bank.store.slabs import Slabs, Slot
from memlong.bank.store.traffic import Traffic, note
from memlong.errors import StorageError

_HOST = torch.device("cpu")

Kept = TypeVar("Kept")
"""How a memory tier keeps a record."""


class Tier(ABC):
    """Records by chunk id, within a budget in bytes; None means no limit."""

    def __init__(self, budget: int | None) -> None:
        self.budget = budget

    @abstractmethod
    def put(self, ids: Sequence[int], records: Records) -> None:
        """Store records; on a StorageError, none is stored."""

    @abstractmethod
    def get(self, ids: Sequence[int]) -> Records:
        """Return the records of ids, all of which are held."""

    @abstractmethod
    def remove(self, ids: Sequence[int]) -> None:
        """Remove the records of those ids that are held; on a StorageError, all are still there."""


class MemoryTier(Tier, Generic[Kept]):
    """Records in memory, the most recently used last."""

    def __init__(self, budget: int | None) -> None:
        super().__init__(budget)
        self._records: OrderedDict[int, Kept] = OrderedDict()

    def remove(self, ids: Sequence[int]) -> None:
        """Drop the records."""
        for chunk_id in ids:
            self._records.pop(chunk_id, None)

    def __contains__(self, chunk_id: int) -> bool:
        return chunk_id in self._records

    def __len__(self) -> int:
        return len(self._records)

    def trim(self, record_bytes: int) -> None:
        """Drop the least recently used records until the rest fit the budget."""
        while self.budget is not None and len(self._records) * record_bytes > self.budget:
            self._records.popitem(last=False)

    def _wanted(self, ids: Sequence[int]) -> list[Kept]:
        for chunk_id in ids:
            self._records.move_to_end(chunk_id)
        return [self._records[chunk_id] for chunk_id in ids]


class TensorTier(MemoryTier[torch.Tensor]):
    """Records as separate tensors, which free their memory individually, on a device or in host memory."""

    def __init__(self, budget: int | None, device: torch.device, slabs: Slabs | None = None) -> None:
        super().__init__(budget)
        self._device = device
        self._slabs = slabs
        self._traffic = Traffic()  # a `get` also puts, which readers on other streams do not know

    def put(self, ids: Sequence[int], records: Records) -> None:
        """Keep the records that are not held yet."""
        for row, chunk_id in enumerate(ids):
            if chunk_id not in self._records:
                self._records[chunk_id] = records.own(row, self._device)
            self._records.move_to_end(chunk_id)
        if self._device.type == "cuda":
            note([self._traffic], torch.cuda.current_stream(self._device), writing=True)

    def get(self, ids: Sequence[int]) -> Records:
        """Return the records, and mark them as most recently used."""
        rows = self._wanted(ids)
        if self._device.type == "cuda" and rows:
            self._traffic.hold_back(torch.cuda.current_stream(self._device), writing=False)
        keep_while_read(rows)  # `trim` may drop them before the device has copied them
        return Records(rows, apart=True, slabs=self._slabs)


class PinnedTier(MemoryTier[Slot]):
    """Records in page-locked host memory, which a CUDA device copies from and to without blocking the host."""

    def __init__(self, budget: int | None, slabs: Slabs) -> None:
        super().__init__(budget)
        self._slabs = slabs

    def put(self, ids: Sequence[int], records: Records) -> None:
        """Keep the slots of the records that are not held yet."""
        for row, chunk_id in enumerate(ids):
            if chunk_id not in self._records:
                self._records[chunk_id] = records.slots()[row]
            self._records.move_to_end(chunk_id)

    def get(self, ids: Sequence[int]) -> Records:
        """Return the records, and mark them as most recently used."""
        return Records.of_slots(self._wanted(ids), self._slabs)

    def remove(self, ids: Sequence[int]) -> None:
        """Drop the records, and release slabs that are now free."""
        super().remove(ids)
        self._slabs.tidy()


class DiskTier(Tier):
    """Records in a file, read directly into slots if there are slabs.

    A forked process reads earlier records from its parent's file, and writes new ones to its own.
    """

    def __init__(
        self, budget: int | None, folder: Path, record_bytes: int, slabs: Slabs | None = None
    ) -> None:
        super().__init__(budget)
        self._folder, self._record_bytes = folder, record_bytes
        self._slots = DiskSlots(folder, record_bytes)
        self._slot_of: dict[int, int] = {}
        self._inherited: dict[int, tuple[DiskSlots, int]] = {}
        self._slabs = slabs

    def put(self, ids: Sequence[int], records: Records) -> None:
        """Write the records to the file."""
        self._part_from_parent()
        try:
            slots = self._slots.write(records.at(_HOST))
            self._slot_of.update(zip(ids, slots, strict=True))
        except StorageError:
            raise
        except BaseException:
            self._slots.keep_only(self._slot_of.values())
            raise

    def get(self, ids: Sequence[int]) -> Records:
        """Read the records from the file."""
        return _read(len(ids), self._record_bytes, self._slabs, partial(self._read_into, ids))

    def remove(self, ids: Sequence[int]) -> None:
        """Release the records' slots."""
        self._part_from_parent()
        for chunk_id in ids:
            self._inherited.pop(chunk_id, None)  # only the parent may release the slot
        leaving = {chunk_id: self._slot_of[chunk_id] for chunk_id in ids if chunk_id in self._slot_of}
        if not leaving:
            return
        try:
            for chunk_id in leaving:  # first: a free slot must never belong to a chunk
                del self._slot_of[chunk_id]
            self._slots.release(list(leaving.values()))
        except StorageError:
            self._slot_of.update(leaving)
            raise
        except BaseException:
            self._slots.keep_only(self._slot_of.values())
            raise

    def _read_into(self, ids: Sequence[int], targets: Sequence[torch.Tensor]) -> None:
        for chunk_id, target in zip(ids, targets, strict=True):
            if chunk_id in self._slot_of:
                self._slots.read_into(self._slot_of[chunk_id], target)
            else:
                slots, slot = self._inherited[chunk_id]
                slots.read_into(slot, target)

    def _part_from_parent(self) -> None:
        """In a forked process, mark the current records as the parent's; each step may safely be repeated."""
        if self._slots.is_ours:
            return
        fresh = DiskSlots(self._folder, self._record_bytes)
        self._inherited |= {chunk_id: (self._slots, slot) for chunk_id, slot in self._slot_of.items()}
        self._slot_of = {}
        self._slots = fresh


class ObjectTier(Tier):
    """Records as objects in a folder; a forked process may only read them."""

    def __init__(
        self, folder: ObjectFolder, kind: BlockKind, record_bytes: int, slabs: Slabs | None = None
    ) -> None:
        super().__init__(None)
        self._folder, self._kind, self._record_bytes, self._slabs = folder, kind, record_bytes, slabs
        self._held: set[int] = set()

    def adopt(self, ids: Sequence[int]) -> None:
        """Take over existing objects."""
        self._held.update(ids)

    def put(self, ids: Sequence[int], records: Records) -> None:
        """Write the records as objects."""
        self._held.update(ids)
        self._folder.write(ids, self._kind, records.at(_HOST))

    def get(self, ids: Sequence[int]) -> Records:
        """Read the records' objects."""
        read = partial(self._folder.read_into, ids, self._kind)
        return _read(len(ids), self._record_bytes, self._slabs, read)

    def remove(self, ids: Sequence[int]) -> None:
        """Remove the records' objects."""
        self._folder.require_owner()
        leaving = self._held.intersection(ids)
        if leaving:
            self._folder.delete(leaving)
            self._held -= leaving


def _read(
    count: int, record_bytes: int, slabs: Slabs | None, read_into: Callable[[Sequence[torch.Tensor]], None]
) -> Records:
    """Read records on the host, directly into slots if there are slabs."""
    if slabs is None:
        records = [torch.empty(record_bytes, dtype=torch.uint8, device=_HOST) for _ in range(count)]
        read_into(records)
        return Records(records, apart=True)
    slots = slabs.take(count)
    slabs.settle(slots, writing=True)
    read_into([slot.record for slot in slots])
    return Records.of_slots(slots, slabs)
