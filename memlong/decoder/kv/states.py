"""Recurrent and convolutional states: what layers without attention carry from token to token, row by row.

Such a state is a few tensors of fixed size. Unlike a window it cannot be cut or moved, so each forward call starts from
copies and leaves new ones; the old ones stay valid for forks and for tokens that are taken back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memlong.bank.store.copying import to_device
from memlong.decoder.arrays import Bools
from memlong.decoder.persistence.saved_values import tensor_of

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

    def of_layer(self, layer: int) -> dict[Key, Tensor]:
        """Return the states of one layer."""
        return {key: state for key, state in self.tensors.items() if key[0] == layer}

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(state.nbytes for state in self.tensors.values())

    def of_rows(self, rows: Sequence[int]) -> States:
        """Return the states of these rows, which may come more than once."""
        begun = self.begun[np.asarray(rows, dtype=np.int64)]
        if not begun.any():
            return States(begun, {})
        return States(begun, {key: _rows(state, rows) for key, state in self.tensors.items()})

    def replaced(self, tensors: Mapping[Key, Tensor]) -> States:
        """Return the states that a forward call of all rows has left."""
        return States(np.ones_like(self.begun), tensors)

    def with_rows(self, rows: Sequence[int], other: States) -> States:
        """Replace the states of these rows by those of ``other``, in that order."""
        if not rows:
            return self
        begun = self.begun.copy()
        begun[list(rows)] = other.begun
        tensors = {}
        for key in self.tensors.keys() | other.tensors.keys():
            mine, theirs = self.tensors.get(key), other.tensors.get(key)
            like = mine if theirs is None else theirs
            assert like is not None  # noqa: S101 - one of the two has it
            state = like.new_zeros((len(begun), *like.shape[1:])) if mine is None else mine.clone()
            where = to_device(torch.tensor(list(rows), device="cpu"), state.device)
            given = state.new_zeros((len(rows), *state.shape[1:])) if theirs is None else theirs
            tensors[key] = state.index_copy(0, where, given)
        return States(begun, tensors)

    def saved(self, prefix: str) -> dict[str, Tensor]:
        """Tensors by name, for `loaded`."""
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
        shapes: Mapping[Key, torch.Size],
        device: torch.device,
    ) -> States:
        """Read what `saved` wrote; ValueError or KeyError if it cannot be states of ``shapes``."""
        begun = tensor_of(
            tensors, f"{prefix}.begun", rows, like=torch.empty(0, dtype=torch.bool, device="cpu")
        )
        found: dict[Key, Tensor] = {}
        if bool(begun.any()):
            for layer, kind, index in shapes:
                name = f"{prefix}.{layer}.{kind}.{index}"
                state, shape = tensors[name], (rows, *shapes[layer, kind, index])
                if state.shape != shape or not state.is_floating_point():
                    raise ValueError(
                        f"{name} must be floats {list(shape)}, got {state.dtype}{list(state.shape)}"
                    )
                found[layer, kind, index] = to_device(state, device)
        return cls(begun.numpy().copy(), found)


def _rows(state: Tensor, rows: Sequence[int]) -> Tensor:
    return state.index_select(0, to_device(torch.tensor(list(rows), device="cpu"), state.device))
