"""Records on their way between the tiers of a store."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memlong.bank.store.copying import separate
from memlong.bank.store.slabs import Slabs, Slot


class Records:
    """n records of one size, on the host or on a device: each is copied to the other once, and only if wanted there.

    Parameters
    ----------
    rows : sequence of torch.Tensor
        n times uint8 [bytes]; nobody changes them.
    apart : bool
        Whether each is all that its memory holds, so that who keeps one keeps no other's memory.
    slabs : Slabs, optional
        Where the host's copies are made, if a CUDA device has the records.
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
        assert self._slabs is not None  # noqa: S101 - where there are no slabs, there is no tier of slots
        if self._slots is None:
            self._slots = self._slabs.bring(self._rows)
        return self._slots

    def at(self, device: torch.device) -> list[torch.Tensor]:
        """Return the records on a device; what is on the host may be read at once."""
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
        """Return one record on a device, in memory of its own, to be kept."""
        given = self.at(device)[row] if self._slabs else self._rows[row].to(device)
        is_own = self._apart or (not self._slabs and given is not self._rows[row])
        return given if is_own else separate(given[None])[0]
