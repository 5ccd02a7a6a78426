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
from transformers.cache_utils import LinearAttentionLayer

from memlong.bank.copying import to_device
from memlong.decoder.arrays import Bools
from memlong.decoder.stored import tensor_of

Key = tuple[int, str, int]
"""Layer, 'conv' or 'recurrent', and number of the state in its layer."""


class StateLayer(LinearAttentionLayer):
    """The states of one layer, as transformers sees them during one forward call. None is written over."""

    def lazy_initialization(
        self,
        conv_states: Tensor | None = None,
        recurrent_states: Tensor | None = None,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> None:
        """Make states of zeros, as transformers' own does."""
        if conv_states is not None:
            width = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            self.dtype, self.device = conv_states.dtype, conv_states.device
            self.conv_kernel_size[state_idx] = width
            self.conv_states[state_idx] = conv_states.new_zeros((*conv_states.shape[:-1], width))
            self.is_conv_states_initialized[state_idx] = True
        if recurrent_states is not None:
            self.recurrent_states[state_idx] = torch.zeros_like(recurrent_states)
            self.is_recurrent_states_initialized[state_idx] = True

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **options: object) -> Tensor:
        """Take in the inputs of a convolution; return them behind those that it still needs."""
        _own(self.conv_states, state_idx)
        return super().update_conv_state(conv_states, state_idx, **options)  # type: ignore[no-any-return, no-untyped-call]

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **options: object) -> Tensor:
        """Take in a state."""
        _own(self.recurrent_states, state_idx)
        self.has_previous_state[state_idx] = True
        return super().update_recurrent_state(recurrent_states, state_idx, **options)  # type: ignore[no-any-return, no-untyped-call]

    def begin_with(self, states: Mapping[Key, Tensor], layer: int) -> None:
        """Go on from the states of this layer; from none if there are none."""
        for (number, kind, index), state in states.items():
            if number != layer:
                continue
            if kind == "conv":
                self.conv_states[index] = state
                self.conv_kernel_size[index] = state.shape[-1]
                self.is_conv_states_initialized[index] = True
                self.dtype, self.device = state.dtype, state.device
            else:
                self.recurrent_states[index] = state
                self.is_recurrent_states_initialized[index] = True
            self.has_previous_state[index] = True

    def left(self, layer: int) -> dict[Key, Tensor]:
        """What the call has left behind, as constants."""
        found = {}
        for kind, states in (("conv", self.conv_states), ("recurrent", self.recurrent_states)):
            for index, state in states.items():
                if state is not None:
                    found[layer, kind, index] = state.detach()
        return found


def _own(states: dict[int, Tensor | None], index: int) -> None:
    """Let what is written to be a copy: transformers writes in place."""
    state = states.get(index)
    if state is not None:
        states[index] = state.clone()


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

    def after(self, layers: Mapping[int, StateLayer]) -> States:
        """What a forward call of all rows has left behind."""
        tensors = {key: state for number, layer in layers.items() for key, state in layer.left(number).items()}
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
        cls, prefix: str, tensors: Mapping[str, Tensor], rows: int, fits: Callable[[Key], bool], device: torch.device
    ) -> States:
        """Read what :meth:`saved` wrote; ValueError or KeyError if it cannot be states of this model."""
        begun = np.array(tensor_of(tensors, f"{prefix}.begun", rows, like=torch.empty(0, dtype=torch.bool)).numpy())
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
