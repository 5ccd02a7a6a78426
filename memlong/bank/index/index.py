"""Index: the base class of backends, which propose candidates for the best rows of a bank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import inf
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch

from memlong.bank.arrays import Floats, Ids
from memlong.bank.index.exact import Similarity
from memlong.bank.index.table import ChunkTable
from memlong.bank.snapshot.options import SavedOptions
from memlong.errors import DeviceUnavailableError, InvalidArgumentError
from memlong.settings import checked, metadata_of, nearest


@dataclass(frozen=True)
class NoOptions:
    """The options of an index that has none."""


Options = TypeVar("Options")


class IndexRows:
    """A read-only view of a bank for its index: one row per chunk, ascending by id; rows do not change during a call.

    Parameters
    ----------
    table
        The bank's table.
    dim : int
        Width of the embeddings.
    similarity : "inner_product" or "l2"
        What to rank by. Under the cosine metric, it is the inner product of normalized (or zero) embeddings.
    device : torch.device
        Device to compute on.
    """

    def __init__(self, table: ChunkTable, dim: int, similarity: Similarity, device: torch.device) -> None:
        self._table = table
        self.dim = dim
        self.similarity: Similarity = similarity
        self.device = device

    def __len__(self) -> int:
        return len(self._table)

    @property
    def ids(self) -> Ids:
        """int64 [n], ascending; a read-only view, valid until the next change."""
        return self._table.ids

    @property
    def embeddings(self) -> Floats:
        """float32 [n, dim]; a view like `ids`."""
        return self._table.embeddings

    @property
    def squared_norms(self) -> Floats:
        """float32 [n], the squared length of each embedding; a view like `ids`."""
        return self._table.squared_norms

    @property
    def longest(self) -> float:
        """An upper bound of the embeddings' lengths."""
        return self._table.longest

    @property
    def spans(self) -> Ids:
        """int64 [n, 2], the token positions [start, end) of each chunk; a view like `ids`."""
        return self._table.spans

    def rows_of(self, ids: Ids) -> Ids:
        """Return the row number of each id, -1 for unknown ids; same shape as `ids`."""
        return self._table.rows_of(ids)


class Index(ABC, Generic[Options]):
    """Proposes candidates for the best rows of a bank; subclasses wrap a search library.

    The bank validates arguments, holds embeddings, keys, values and usage, scores the candidates, searches by brute
    force if there are too few, evicts and locks. `add`, `remove`, `reset` and `load` run alone, searches concurrently.
    If one of the former raises, or `remove` returns False, the index is rebuilt (`reset`, then one `add` of all rows)
    before its next use: an index may refuse what it cannot do well, and never has to repair itself. An exception of
    `search` reaches the bank's caller.

    Parameters
    ----------
    rows : IndexRows
        The rows to index. During `add` they already contain the new ones, during `remove` still the leaving ones.
    options
        An instance of `options_class`, validated against the bounds declared by its fields.

    Raises
    ------
    InvalidArgumentError
        If an option does not fit the rows.
    DeviceUnavailableError
        If the index cannot compute on the device.
    """

    options_class: ClassVar[type] = NoOptions
    """A frozen dataclass of `memlong.settings.setting` fields: an option is declared there and nowhere else."""

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    """The device types that the index can compute on."""

    repairs_before_changes: ClassVar[bool] = False
    """Whether an outdated index is rebuilt before the next change, not only before a search."""

    def __init__(self, rows: IndexRows, options: Options) -> None:
        self.rows = rows
        self.options = options

    @abstractmethod
    def add(self, ids: Ids, embeddings: Floats) -> None:
        """Add the last n >= 1 rows, which are new.

        Parameters
        ----------
        ids : numpy.ndarray
            int64 [n], ascending, greater than all others. Like `embeddings`, read-only and valid only during the call.
        embeddings : numpy.ndarray
            float32 [n, dim].
        """

    @abstractmethod
    def search(self, queries: Floats, k: int) -> Ids:
        """Propose candidates for the k best rows of each query.

        Parameters
        ----------
        queries : numpy.ndarray
            float32 [q, dim], q >= 1.
        k : int
            From 1 to the number of rows.

        Returns
        -------
        numpy.ndarray
            int64 ids [q, c] in any order. More than k increase the recall; -1 and ids of removed rows are ignored.
        """

    @abstractmethod
    def remove(self, ids: Ids) -> bool:
        """Remove n >= 1 rows, int64 ids [n], ascending, and return True; or return False to be rebuilt."""

    @abstractmethod
    def reset(self) -> None:
        """Empty the index; called once before anything else."""

    def dump(self) -> tuple[Mapping[str, Any], bytes] | None:
        """Return facts about the index for JSON, and the content of its file; None to have it rebuilt.

        Searches may run at the same time.
        """
        return None

    def load(self, facts: Mapping[str, Any], content: bytes) -> None:  # noqa: ARG002 - a subclass's
        """Restore what `dump` returned for the current rows; called on an empty index.

        Raise a RuntimeError, ValueError, KeyError or TypeError if it does not fit.
        """
        raise ValueError("it saves no index")

    def after_fork(self) -> None:
        """Prepare a multithreaded library for a forked process; the index is then reset and rebuilt."""

    @classmethod
    def usable_device(cls, device: str | torch.device | None) -> torch.device:
        """Return the requested device, by default the CPU; subclasses add the checks of their library.

        Raises
        ------
        InvalidArgumentError
            If there is no such device.
        DeviceUnavailableError
            If the index cannot compute there.
        """
        try:
            chosen = torch.device("cpu" if device is None else device)
        except (RuntimeError, TypeError) as error:
            raise InvalidArgumentError(f"device {device!r} is not the name of a torch device") from error
        if chosen.type not in cls.devices:
            raise DeviceUnavailableError(
                f"{cls.__name__} cannot compute on {chosen}; it can on: {', '.join(cls.devices)}"
            )
        return chosen

    @classmethod
    def make_options(cls, given: Mapping[str, Any]) -> Options:
        """Validate options, and return them.

        Raises
        ------
        InvalidArgumentError
            If an option is invalid or unknown.
        """
        names = [each.name for each in fields(cls.options_class)]
        for name in given:
            if name not in names:
                raise InvalidArgumentError(
                    f"{cls.__name__} has no option {name!r}{nearest(name, names)}; it has: "
                    f"{', '.join(names) or 'none'}, besides those of every bank"
                )
        return cast("Options", cls.options_class(**checked(cls.options_class(**given))))

    @classmethod
    def saved_options(cls) -> SavedOptions:
        """Return the options that a snapshot may set, each with the maximum for untrusted ones, or None."""
        chosen = [each for each in fields(cls.options_class) if metadata_of(each).is_saved]
        most = {}
        for each in chosen:
            said = metadata_of(each)
            most[each.name] = said.most if said.most_of_strangers is None else said.most_of_strangers
        return {name: None if bound == inf else bound for name, bound in most.items()}

    def options_to_save(self) -> dict[str, Any]:
        """Return the options to store in a snapshot."""
        names = self.saved_options()
        return {name: value for name, value in asdict(cast("Any", self.options)).items() if name in names}
