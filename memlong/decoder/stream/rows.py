"""Rows of batches taken apart, so that others can go on side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memlong.decoder.kv.columns import PADDING
from memlong.decoder.stream.batch import StreamBatch

_TOKENS = "window.tokens"


@dataclass(frozen=True)
class RowState:
    """One row of a batch, without its bank: what `StreamBatch.restore` takes of a batch of this row alone.

    Attributes
    ----------
    facts
        What JSON can hold of it.
    tensors
        The rest, on the CPU.
    """

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its window, its states and what it has retrieved."""
        return sum(each.nbytes for each in self.tensors.values())

    @property
    def is_empty(self) -> bool:
        """Whether it has read nothing."""
        return not self.tensors[_TOKENS].numel()


def apart(batch: StreamBatch) -> list[RowState]:
    """Return the state of each row, without the columns that pad it."""
    tensors = batch.tensors()
    return [RowState(stream.facts(), _row(tensors, row, batch)) for row, stream in enumerate(batch.streams)]


def together(rows: Sequence[RowState], batch: StreamBatch) -> None:
    """Let a new batch, of as many streams, continue from these rows."""
    tensors: dict[str, Tensor] = {}
    for name in sorted({name for row in rows for name in row.tensors if not name.startswith("row.")}):
        tensors[name] = _stacked([row.tensors.get(name) for row in rows], PADDING if _TOKENS in name else 0)
    for number, row in enumerate(rows):
        tensors |= {
            name.replace("row.0.", f"row.{number}.", 1): each
            for name, each in row.tensors.items()
            if name.startswith("row.")
        }
    batch.restore([row.facts for row in rows], tensors)


def _row(tensors: Mapping[str, Tensor], row: int, batch: StreamBatch) -> dict[str, Tensor]:
    found = {}
    for name, each in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "row":
            if rest.startswith(f"{row}."):
                found[name.replace(f"row.{row}.", "row.0.", 1)] = each.cpu().clone()
            continue
        mine = each[row : row + 1]
        if name.startswith(_TOKENS):
            mine = mine[:, mine[0] != PADDING]
        elif kind == "window":
            columns = batch.window.columns_of(int(rest.partition(".")[0]))
            mine = mine[:, :, torch.from_numpy(columns.valid[row]).to(each.device)]
        found[name] = mine.cpu().clone()
    return found


def _stacked(each: Sequence[Tensor | None], padding: int) -> Tensor:
    """Stack tensors [1, ...] whose sizes may differ in one dimension; what a row does not have is padding."""
    given = [mine for mine in each if mine is not None]
    sizes = torch.tensor([mine.shape for mine in given]).amax(dim=0).tolist()
    whole = []
    for mine in each:
        if mine is None:
            whole.append(given[0].new_full(sizes, padding))
            continue
        missing = [(0, size - have) for size, have in zip(sizes, mine.shape, strict=True)]
        whole.append(
            functional.pad(mine, [number for pair in reversed(missing) for number in pair], value=padding)
        )
    return torch.cat(whole)
