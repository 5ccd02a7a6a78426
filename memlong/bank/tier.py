"""One tier of a store: records by chunk id, in memory or on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch

from memlong.bank.copying import keep_while_read, separate
from memlong.bank.disk import DiskSlots
from memlong.errors import StorageError


class Tier(ABC):
    """Records by chunk id, within a budget of bytes; None is no limit."""

    def __init__(self, budget: int | None) -> None:
        self.budget = budget

    @abstractmethod
    def put(self, ids: Sequence[int], records: torch.Tensor) -> None:
        """Store records [n, bytes], uint8; if this raises StorageError, none is."""

    @abstractmethod
    def get(self, ids: Sequence[int]) -> list[torch.Tensor]:
        """Return the records of ids that are held."""

    @abstractmethod
    def remove(self, ids: Sequence[int]) -> None:
        """Forget the records of ids, those that are held; if this raises StorageError, all are still there."""


class MemoryTier(Tier):
    """Records as tensors, in the host's memory (pinned where there is CUDA) or on a device."""

    def __init__(self, budget: int | None, device: torch.device, *, pinned: bool) -> None:
        super().__init__(budget)
        self._device, self._pinned = device, pinned
        self._records: OrderedDict[int, torch.Tensor] = OrderedDict()

    def put(self, ids: Sequence[int], records: torch.Tensor) -> None:
        """Store copies of those that are not held yet."""
        for chunk_id, record in zip(ids, records, strict=True):
            if chunk_id not in self._records:
                (own,) = separate(record[None].to(self._device))  # not a view of all the others
                self._records[chunk_id] = own.pin_memory() if self._pinned else own
            self._records.move_to_end(chunk_id)

    def get(self, ids: Sequence[int]) -> list[torch.Tensor]:
        """Return the records, now the ones wanted last."""
        for chunk_id in ids:
            self._records.move_to_end(chunk_id)
        records = [self._records[chunk_id] for chunk_id in ids]
        keep_while_read(records)  # `trim` may let go of them before the device has come to the copy
        return records

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


class DiskTier(Tier):
    """Records in a file."""

    def __init__(self, budget: int | None, folder: Path, record_bytes: int) -> None:
        super().__init__(budget)
        self._slots = DiskSlots(folder, record_bytes)
        self._slot_of: dict[int, int] = {}

    def put(self, ids: Sequence[int], records: torch.Tensor) -> None:
        """Write them to the file."""
        try:
            slots = self._slots.write(records.cpu())
            self._slot_of.update(zip(ids, slots, strict=True))
        except StorageError:
            raise
        except BaseException:
            self._slots.keep_only(self._slot_of.values())
            raise

    def get(self, ids: Sequence[int]) -> list[torch.Tensor]:
        """Read them from the file."""
        return list(self._slots.read([self._slot_of[chunk_id] for chunk_id in ids]))

    def remove(self, ids: Sequence[int]) -> None:
        """Give their slots back."""
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
