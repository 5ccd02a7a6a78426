"""Recurrent and convolutional states: what layers without attention carry from token to token, row by row.

Such a state is a few tensors of fixed size. It cannot be cut or moved as a window can, so each forward call begins from
copies and leaves new ones; what it began from stays as it was, for whoever goes another way or takes tokens back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from memlong.bank.copying import to_device
from memlong.decoder.arrays import Bools
from memlong.decoder.stored import tensor_of

Key = tuple[int, str, int]
"""Layer, 'conv' or 'recurrent', and number of the state in its layer."""


@dataclass(frozen=True)
class States:
    """The states of a batch of rows.

    Attributes
    ----------
    begun
        [rows], on the host: which rows have any; the states of others are zeros.
    tensors
        [rows, ...] each; none at all before the first row has begun.
    """

    begun: Bools
    tensors: Mapping[Key, Tensor]

    @classmethod
    def none(cls, rows: int) -> States:
        """The states of rows that have read nothing."""
        return cls(np.zeros(rows, dtype=bool), {})

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(state.nbytes for state in self.tensors.values())

    def of_rows(self, rows: Sequence[int]) -> States:
        """Those of these rows, which may come more than once."""
        begun = self.begun[np.asarray(rows, dtype=np.int64)]
        if not begun.any():
            return States(begun, {})
        return States(begun, {key: _rows(state, rows) for key, state in self.tensors.items()})

    def replaced(self, tensors: Mapping[Key, Tensor]) -> States:
        """What a forward call of all rows has left behind."""
        return States(np.ones_like(self.begun), tensors)

    def with_rows(self, rows: Sequence[int], other: States) -> States:
        """Put in the states of these rows, which ``other`` holds in that order."""
        if not rows:
            return self
        begun = self.begun.copy()
        begun[list(rows)] = other.begun
        tensors = {}
        for key in self.tensors.keys() | other.tensors.keys():
            mine, theirs = self.tensors.get(key), other.tensors.get(key)
            like = mine if theirs is None else theirs
            assert like is not None  # noqa: S101 - one of both has it
            state = like.new_zeros((len(begun), *like.shape[1:])) if mine is None else mine.clone()
            where = to_device(torch.tensor(list(rows), device="cpu"), state.device)
            given = state.new_zeros((len(rows), *state.shape[1:])) if theirs is None else theirs
            tensors[key] = state.index_copy(0, where, given)
        return States(begun, tensors)

    def saved(self, prefix: str) -> dict[str, Tensor]:
        """Tensors by name, for :meth:`loaded`."""
        found = {f"{prefix}.begun": torch.from_numpy(self.begun)}
        return found | {
            f"{prefix}.{layer}.{kind}.{index}": state for (layer, kind, index), state in self.tensors.items()
        }

    @classmethod
    def loaded(
        cls,
        prefix: str,
        tensors: Mapping[str, Tensor],
        rows: int,
        fits: Callable[[Key], bool],
        device: torch.device,
    ) -> States:
        """Read what :meth:`saved` wrote; ValueError or KeyError if it cannot be states of this model."""
        begun = np.array(
            tensor_of(tensors, f"{prefix}.begun", rows, like=torch.empty(0, dtype=torch.bool)).numpy()
        )
        found: dict[Key, Tensor] = {}
        for name, state in tensors.items():
            parts = name.removeprefix(f"{prefix}.").split(".")
            if not name.startswith(f"{prefix}.") or len(parts) != 3:
                continue
            key = (int(parts[0]), parts[1], int(parts[2]))
            if parts[1] not in ("conv", "recurrent") or not fits(key) or state.shape[:1] != (rows,):
                raise ValueError(f"{name} is no state of this model")
            found[key] = to_device(state, device)
        if begun.any() and not found:
            raise ValueError("states are missing")
        return replace(cls.none(rows), begun=begun, tensors=found)


def _rows(state: Tensor, rows: Sequence[int]) -> Tensor:
    return state.index_select(0, to_device(torch.tensor(list(rows), device="cpu"), state.device))
