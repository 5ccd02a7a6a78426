"""Room behind keys and values for those of tokens that come one by one, so that none is copied again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_SPARE, _FEW = 64, 4


def few(states: Tensor) -> bool:
    """Whether so few columns [rows, kv_heads, columns, head_dim] come, without gradients, that room for more pays."""
    return states.shape[2] <= _FEW and not torch.is_grad_enabled()


@dataclass(frozen=True)
class Room:
    """Keys and values, [rows, kv_heads, room, head_dim] each, of which the first columns are in use.

    Who came first sees the first columns; what is written behind them changes nothing for him.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def around(cls, *parts: Tensor) -> Self:
        """Return room for parts side by side, given as keys and values in turns, and for more behind them."""
        rooms = []
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # it is written to later, whatever the mode is then
            for states in (parts[0::2], parts[1::2]):
                first = states[0]
                rows, heads, _, width = first.shape
                used = sum(each.shape[2] for each in states)
                room = torch.empty(rows, heads, used + _SPARE, width, dtype=first.dtype, device=first.device)
                torch.cat(states, dim=2, out=room[:, :, :used])
                rooms.append(room)
        return cls(*rooms)

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.keys.nbytes + self.values.nbytes

    def has_space(self, columns: int) -> bool:
        """Whether there is room for so many columns in all."""
        return columns <= self.keys.shape[2]

    def put(self, count: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write behind the first ``count`` columns, and return all up to the last of these."""
        end = count + keys.shape[2]
        self.keys[:, :, count:end] = keys
        self.values[:, :, count:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]
