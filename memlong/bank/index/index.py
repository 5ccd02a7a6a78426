"""Index: what a backend is, something that names the likely best rows of a bank's table."""

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
    """What an index sees of its bank: one row for each chunk, ascending by id. Nobody else changes them meanwhile.

    Parameters
    ----------
    table
        Of the bank.
    dim : int
        Width of the embeddings.
    similarity : "inner_product" or "l2"
        What to rank by. Under the cosine metric it is the inner product, of embeddings of unit length or zero.
    device : torch.device
        Where to compute.
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
        """int64 [n], ascending; a view, valid until the next change, and not to be written to."""
        return self._table.ids

    @property
    def embeddings(self) -> Floats:
        """float32 [n, dim], as `ids` is."""
        return self._table.embeddings

    @property
    def squared_norms(self) -> Floats:
        """float32 [n], the squared length of each embedding, as `ids` is."""
        return self._table.squared_norms

    @property
    def longest(self) -> float:
        """A length that no embedding exceeds."""
        return self._table.longest

    @property
    def spans(self) -> Ids:
        """int64 [n, 2], the token positions [start, end) of each chunk, as `ids` is."""
        return self._table.spans

    def rows_of(self, ids: Ids) -> Ids:
        """Return the row number of each id, -1 where there is none; same shape as `ids`."""
        return self._table.rows_of(ids)


class Index(ABC, Generic[Options]):
    """Names candidates for the best rows of a bank's table; subclasses wrap a search library.

    The bank checks what comes in, holds embeddings, keys, values and usage, scores what an index names, searches again
    by brute force where it names too few, evicts and locks. `add`, `remove`, `reset` and `load` run alone, searches
    together. If one of the former raises, or `remove` returns False, the index is rebuilt (`reset`, then one `add` of
    all rows) before its next use: so an index may refuse what it cannot do well, and need never repair itself.

    Parameters
    ----------
    rows : IndexRows
        The rows that it is an index over: when `add` is called they hold the new ones already, when `remove` is called
        those that leave still.
    options
        Of the class `options_class`, checked against the bounds that its fields declare.

    Raises
    ------
    InvalidArgumentError
        If an option does not go with the rows.
    DeviceUnavailableError
        If the index cannot compute on the device.
    """

    options_class: ClassVar[type] = NoOptions
    """A frozen dataclass of `memlong.settings.setting` fields: an option is declared there and nowhere else."""

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    """The device types that it can compute on."""

    repairs_before_changes: ClassVar[bool] = False
    """Whether an index that has to be rebuilt is so before the next change already, and not only before a search."""

    def __init__(self, rows: IndexRows, options: Options) -> None:
        self.rows = rows
        self.options = options

    @abstractmethod
    def add(self, ids: Ids, embeddings: Floats) -> None:
        """Take up n >= 1 new rows, the last ones.

        Parameters
        ----------
        ids : numpy.ndarray
            int64 [n], ascending, above all others; like `embeddings` lent for the call alone, and not to be changed.
        embeddings : numpy.ndarray
            float32 [n, dim].
        """

    @abstractmethod
    def search(self, queries: Floats, k: int) -> Ids:
        """Name candidates for the k best rows of each query.

        Parameters
        ----------
        queries : numpy.ndarray
            float32 [q, dim], q >= 1.
        k : int
            From 1 to the number of rows.

        Returns
        -------
        numpy.ndarray
            int64 ids [q, c] in any order; more than k raise the recall, and -1 and ids that have left count for
            nothing.
        """

    @abstractmethod
    def remove(self, ids: Ids) -> bool:
        """Forget n >= 1 rows, int64 ids [n], ascending; return False to be rebuilt instead."""

    @abstractmethod
    def reset(self) -> None:
        """Be empty; called once before all else."""

    def dump(self) -> tuple[Mapping[str, Any], bytes] | None:
        """Return the index as a file's content, with what JSON can hold of the rest; None to have it rebuilt.

        Searches may run at the same time.
        """
        return None

    def load(self, facts: Mapping[str, Any], content: bytes) -> None:  # noqa: ARG002 - a subclass's
        """Take over what `dump` returned for the present rows; the index is as after `reset`.

        A RuntimeError, ValueError, KeyError or TypeError says that it does not fit.
        """
        raise ValueError("it saves no index")

    def after_fork(self) -> None:
        """Make a library that has threads fit for a forked process; the index is reset and rebuilt afterwards."""

    @classmethod
    def usable_device(cls, device: str | torch.device | None) -> torch.device:
        """Return the device asked for, by default the CPU; a subclass extends this with what its library needs.

        Raises
        ------
        InvalidArgumentError
            If it is no device.
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
        """Return options, checked.

        Raises
        ------
        InvalidArgumentError
            If one cannot be used, or there is none of that name.
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
        """Return the options that a file may choose, each with the most that a stranger's may ask for, or None."""
        chosen = [each for each in fields(cls.options_class) if metadata_of(each).is_saved]
        most = {}
        for each in chosen:
            said = metadata_of(each)
            most[each.name] = said.most if said.most_of_strangers is None else said.most_of_strangers
        return {name: None if bound == inf else bound for name, bound in most.items()}

    def options_to_save(self) -> dict[str, Any]:
        """Return the options that go into a snapshot."""
        names = self.saved_options()
        return {name: value for name, value in asdict(cast("Any", self.options)).items() if name in names}
