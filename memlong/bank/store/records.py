"""Records in transit between the tiers of a store."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memlong.bank.store.copying import separate
from memlong.bank.store.slabs import Slabs, Slot


class Records:
    """n records of equal size, on the host or a device, copied to the other at most once, and only if needed there.

    Parameters
    ----------
    rows : sequence of torch.Tensor
        n tensors, uint8 [bytes], that are never modified.
    apart : bool
        Whether each has its own memory, so that keeping one does not keep the memory of others.
    slabs : Slabs, optional
        Page-locked memory for copies on the host, if the records are on a CUDA device.
    """

    def __init__(self, rows: Sequence[torch.Tensor], *, apart: bool, slabs: Slabs | None = None) -> None:
        self._rows = list(rows)
        self._apart = apart
        self._slabs = slabs
        self._slots: list[Slot] | None = None

    @classmethod
    def of_slots(cls, slots: list[Slot], slabs: Slabs) -> Records:
        """Return records that are in slots."""
        records = cls([], apart=True, slabs=slabs)
        records._slots = slots
        return records

    def slots(self) -> list[Slot]:
        """Return the records in page-locked memory; a device may still be copying them there."""
        assert self._slabs is not None  # noqa: S101 - without slabs there is no tier of slots
        if self._slots is None:
            self._slots = self._slabs.bring(self._rows)
        return self._slots

    def at(self, device: torch.device) -> list[torch.Tensor]:
        """Return the records on a device; on the host, they can be read immediately."""
        if self._slabs is None:
            return [row.to(device) for row in self._rows]
        if device.type == "cpu":
            slots = self.slots()
            self._slabs.settle(slots)
            return [slot.record for slot in slots]
        if not self._rows and self._slots:
            self._rows = self._slabs.send(self._slots)
        return self._rows

    def own(self, row: int, device: torch.device) -> torch.Tensor:
        """Return one record on a device, in its own memory, to be kept."""
        given = self.at(device)[row] if self._slabs else self._rows[row].to(device)
        is_own = self._apart or (not self._slabs and given is not self._rows[row])
        return given if is_own else separate(given[None])[0]
