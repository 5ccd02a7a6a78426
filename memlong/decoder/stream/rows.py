"""Rows of batches taken apart, so that others can go on side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memlong.decoder.kv.columns import PADDING
from memlong.decoder.kv.window import LocalWindow
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
    rows: list[dict[str, Tensor]] = [{} for _ in batch.streams]
    for name in list(tensors):
        each = tensors.pop(name)  # so that no more than one copy of everything is there
        kind, _, rest = name.partition(".")
        if kind == "row":
            row, _, what = rest.partition(".")
            rows[int(row)][f"row.0.{what}"] = each.cpu().clone()
            continue
        for number, found in enumerate(rows):
            found[name] = _of_row(name, each, number, batch.window).cpu().clone()
    return [RowState(stream.facts(), found) for stream, found in zip(batch.streams, rows, strict=True)]


def together(rows: Sequence[RowState], batch: StreamBatch) -> None:
    """Let a new batch, of as many streams, continue from these rows."""
    batch.restore([row.facts for row in rows], _Together(rows))


class _Together(Mapping[str, Tensor]):
    """The tensors of several rows, each stacked when it is asked for."""

    def __init__(self, rows: Sequence[RowState]) -> None:
        self._rows = rows
        self._own = {
            name.replace("row.0.", f"row.{number}.", 1): each
            for number, row in enumerate(rows)
            for name, each in row.tensors.items()
            if name.startswith("row.")
        }
        self._common = sorted({name for row in rows for name in row.tensors if not name.startswith("row.")})

    def __getitem__(self, name: str) -> Tensor:
        if name in self._own:
            return self._own[name]
        each = [row.tensors.get(name) for row in self._rows]
        if all(mine is None for mine in each):
            raise KeyError(name)
        return _stacked(each, PADDING if name.startswith(_TOKENS) else 0)

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self._common

    def __len__(self) -> int:
        return len(self._own) + len(self._common)


def _of_row(name: str, each: Tensor, row: int, window: LocalWindow) -> Tensor:
    kind, _, rest = name.partition(".")
    mine = each[row : row + 1]
    if name.startswith(_TOKENS):
        return mine[:, mine[0] != PADDING]
    if kind == "window":
        columns = window.columns_of(int(rest.partition(".")[0]))
        return mine[:, :, torch.from_numpy(columns.valid[row]).to(each.device)]
    return mine


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
