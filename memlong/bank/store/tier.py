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
"""What a tier in memory keeps of a record."""


class Tier(ABC):
    """Records by chunk id, within a budget of bytes; None is no limit."""

    def __init__(self, budget: int | None) -> None:
        self.budget = budget

    @abstractmethod
    def put(self, ids: Sequence[int], records: Records) -> None:
        """Store records; if this raises StorageError, none is."""

    @abstractmethod
    def get(self, ids: Sequence[int]) -> Records:
        """Return the records of ids that are held."""

    @abstractmethod
    def remove(self, ids: Sequence[int]) -> None:
        """Forget the records of ids, those that are held; if this raises StorageError, all are still there."""


class MemoryTier(Tier, Generic[Kept]):
    """Records in memory, those wanted last at the end."""

    def __init__(self, budget: int | None) -> None:
        super().__init__(budget)
        self._records: OrderedDict[int, Kept] = OrderedDict()

    def remove(self, ids: Sequence[int]) -> None:
        """Let go of the records."""
        for chunk_id in ids:
            self._records.pop(chunk_id, None)

    def __contains__(self, chunk_id: int) -> bool:
        return chunk_id in self._records

    def __len__(self) -> int:
        return len(self._records)

    def trim(self, record_bytes: int) -> None:
        """Let go of what was wanted longest ago, until the rest is within the budget."""
        while self.budget is not None and len(self._records) * record_bytes > self.budget:
            self._records.popitem(last=False)

    def _wanted(self, ids: Sequence[int]) -> list[Kept]:
        for chunk_id in ids:
            self._records.move_to_end(chunk_id)
        return [self._records[chunk_id] for chunk_id in ids]


class TensorTier(MemoryTier[torch.Tensor]):
    """Records as tensors of their own, which give their memory back, on a device or in the host's memory."""

    def __init__(self, budget: int | None, device: torch.device, slabs: Slabs | None = None) -> None:
        super().__init__(budget)
        self._device = device
        self._slabs = slabs
        self._traffic = Traffic()  # a `get` puts, too: whoever reads on other streams knows nothing of that

    def put(self, ids: Sequence[int], records: Records) -> None:
        """Keep those that are not held yet."""
        for row, chunk_id in enumerate(ids):
            if chunk_id not in self._records:
                self._records[chunk_id] = records.own(row, self._device)
            self._records.move_to_end(chunk_id)
        if self._device.type == "cuda":
            note([self._traffic], torch.cuda.current_stream(self._device), writing=True)

    def get(self, ids: Sequence[int]) -> Records:
        """Return the records, now the ones wanted last."""
        rows = self._wanted(ids)
        if self._device.type == "cuda" and rows:
            self._traffic.hold_back(torch.cuda.current_stream(self._device), writing=False)
        keep_while_read(rows)  # `trim` may let go of them before the device has come to the copy
        return Records(rows, apart=True, slabs=self._slabs)


class PinnedTier(MemoryTier[Slot]):
    """Records in page-locked memory of the host, which a CUDA device copies from and to while the host goes on."""

    def __init__(self, budget: int | None, slabs: Slabs) -> None:
        super().__init__(budget)
        self._slabs = slabs

    def put(self, ids: Sequence[int], records: Records) -> None:
        """Keep the slots of those that are not held yet."""
        for row, chunk_id in enumerate(ids):
            if chunk_id not in self._records:
                self._records[chunk_id] = records.slots()[row]
            self._records.move_to_end(chunk_id)

    def get(self, ids: Sequence[int]) -> Records:
        """Return the records, now the ones wanted last."""
        return Records.of_slots(self._wanted(ids), self._slabs)

    def remove(self, ids: Sequence[int]) -> None:
        """Let go of the records, and of slabs that are free then."""
        super().remove(ids)
        self._slabs.tidy()


class DiskTier(Tier):
    """Records in a file; where there are slabs, read straight into slots.

    A forked process reads what there was from its parent's file, and has a file of its own for what it adds.
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
        """Write them to the file."""
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
        """Read them from the file."""
        return _read(len(ids), self._record_bytes, self._slabs, partial(self._read_into, ids))

    def remove(self, ids: Sequence[int]) -> None:
        """Give their slots back."""
        self._part_from_parent()
        for chunk_id in ids:
            self._inherited.pop(chunk_id, None)  # the slot is the parent's to give back
        leaving = {chunk_id: self._slot_of[chunk_id] for chunk_id in ids if chunk_id in self._slot_of}
        if not leaving:
            return
        try:
            for chunk_id in leaving:  # first: a slot that is free must never be anyone's
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
        """In a forked process, keep what there is as the parent's; each step may be taken twice."""
        if self._slots.is_ours:
            return
        fresh = DiskSlots(self._folder, self._record_bytes)
        self._inherited |= {chunk_id: (self._slots, slot) for chunk_id, slot in self._slot_of.items()}
        self._slot_of = {}
        self._slots = fresh


class ObjectTier(Tier):
    """Records as objects in a folder, which a forked process only reads."""

    def __init__(
        self, folder: ObjectFolder, kind: BlockKind, record_bytes: int, slabs: Slabs | None = None
    ) -> None:
        super().__init__(None)
        self._folder, self._kind, self._record_bytes, self._slabs = folder, kind, record_bytes, slabs
        self._held: set[int] = set()

    def adopt(self, ids: Sequence[int]) -> None:
        """Take over objects that are there."""
        self._held.update(ids)

    def put(self, ids: Sequence[int], records: Records) -> None:
        """Write them as objects."""
        self._held.update(ids)
        self._folder.write(ids, self._kind, records.at(_HOST))

    def get(self, ids: Sequence[int]) -> Records:
        """Read their objects."""
        read = partial(self._folder.read_into, ids, self._kind)
        return _read(len(ids), self._record_bytes, self._slabs, read)

    def remove(self, ids: Sequence[int]) -> None:
        """Remove their objects."""
        self._folder.require_owner()
        leaving = self._held.intersection(ids)
        if leaving:
            self._folder.delete(leaving)
            self._held -= leaving


def _read(
    count: int, record_bytes: int, slabs: Slabs | None, read_into: Callable[[Sequence[torch.Tensor]], None]
) -> Records:
    """Return records that are read on the host, straight into slots where there are slabs."""
    if slabs is None:
        records = [torch.empty(record_bytes, dtype=torch.uint8, device=_HOST) for _ in range(count)]
        read_into(records)
        return Records(records, apart=True)
    slots = slabs.take(count)
    slabs.settle(slots, writing=True)
    read_into([slot.record for slot in slots])
    return Records.of_slots(slots, slabs)
