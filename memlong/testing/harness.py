"""Shared by the suites: create banks and chunks, and record a bank's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from memlong.bank import Index, MemoryBank, bank_of
from memlong.testing.footprint import index_bytes

_Clause = TypeVar("_Clause", bound=Callable[..., None])
_Class = TypeVar("_Class", bound="type[BankSuite]")

DIM = 32
BLOCK = (2, 2, 3, 4)
METRICS = ("cosine", "inner_product", "l2")


@dataclass(frozen=True, eq=False)
class Chunks:
    """Arguments of one `add`: n random embeddings, distinct K-V blocks and consecutive spans."""

    embeddings: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    spans: torch.Tensor

    def into(self, bank: MemoryBank) -> torch.Tensor:
        """Add them and return their ids."""
        return bank.add(self.embeddings, self.keys, self.values, self.spans)


class Suite:
    """A suite that plugin authors subclass; the docstring of each test states a clause of the contract."""


class BankSuite(Suite):
    """The settings of a bank's suite; see `MemoryBankTests`."""

    index_class: type[Index[Any]]
    bank_class: type[MemoryBank]
    options: ClassVar[Mapping[str, Any]] = {}
    recall_floor: float = 0.95
    exact: bool = False

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "index_class" in vars(cls):
            cls.bank_class = bank_of(cls.index_class)

    def make(self, **options: Any) -> MemoryBank:
        """Return a new, empty bank of width `DIM`."""
        return self.bank_class(DIM, **{**self.options, **options})

    def index_bytes(self, bank: MemoryBank) -> int:
        """Return the size of a bank's index; by default of its Python objects and its saved file."""
        return index_bytes(bank)

    def filled(self, count: int, **options: Any) -> tuple[MemoryBank, Chunks]:
        """Return a bank with `count` chunks, and the chunks."""
        bank, chunks = self.make(**options), random_chunks(count)
        chunks.into(bank)
        return bank, chunks


def whatever_the_options(clause: _Clause) -> _Clause:
    """Mark a clause whose outcome does not depend on a bank's options; see `another_configuration`."""
    clause.holds_whatever_the_options = True  # type: ignore[attr-defined]
    return clause


def another_configuration(suite: _Class) -> _Class:
    """Skip clauses that do not depend on a bank's options, for a class that another full suite already tests.

    `MemoryBank` checks arguments, copies inputs and counts uses before and after it calls an index, so those clauses
    show nothing new for other options of the same class.

    Examples
    --------
    >>> @another_configuration
    ... class TestFaissHnsw(MemoryBankTests):
    ...     index_class = FaissIndex
    ...     options = {"index": "HNSW32"}
    """
    for name in dir(suite):
        if getattr(getattr(suite, name), "holds_whatever_the_options", False):
            setattr(suite, name, None)  # not collected as a test
    return suite


def random_vectors(count: int, seed: int = 0) -> torch.Tensor:
    """Return float32 [count, DIM] vectors from a normal distribution."""
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def random_chunks(count: int, seed: int = 0, dtype: torch.dtype = torch.float32, first: int = 0) -> Chunks:
    """Return `count` chunks; all keys in the i-th block equal first + i, all values its negative."""
    numbers = torch.arange(first, first + count).to(dtype)
    keys = numbers.view(-1, 1, 1, 1, 1).repeat(1, *BLOCK)
    starts = torch.arange(first, first + count) * 3
    return Chunks(random_vectors(count, seed), keys, -keys, torch.stack([starts, starts + 3], dim=1))


def state_of(bank: MemoryBank) -> list[np.ndarray[Any, Any]]:
    """Return the observable state of a bank, except K-V."""
    held, usage = bank.embeddings, bank.usage
    found = bank.search(random_vectors(3, seed=99), 5)
    return [
        np.array([len(bank), bank.nbytes]),
        bank.ids.numpy(),
        held.ids.numpy(),
        held.embeddings.numpy(),
        usage.ids,
        usage.retrievals,
        found.ids.numpy(),
        found.scores.numpy(),
    ]


def assert_found(share: float, floor: float, what: str = "the index returns") -> None:
    """Fail if less than the floor was found, with hints on what to check."""
    assert share >= floor, (
        f"{what} {share:.3f} of the true best, and recall_floor is {floor:g}. Check the metric (does the library rank "
        "by rows.similarity, best first?), the search effort (ef, nprobe, candidates), how the index is built or "
        "trained (links, effort, enough representative vectors), and what it returns (ids of chunks, not the library's "
        "row numbers; no removed chunks in place of present ones)"
    )


def assert_same_state(before: list[np.ndarray[Any, Any]], bank: MemoryBank) -> None:
    """Fail unless the bank's state equals `before`."""
    for one, other in zip(before, state_of(bank), strict=True):
        np.testing.assert_array_equal(one, other)
