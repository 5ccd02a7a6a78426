"""What a backend implements: an index that names candidates, kept in step with the bank's table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from memlong.bank.arrays import Floats, Ids
from memlong.bank.contents import Contents
from memlong.bank.exact import Similarity
from memlong.bank.forks import tell_after_fork
from memlong.bank.lock import ReadWriteLock
from memlong.bank.ranking import Ranking, missing, rank, rank_exactly
from memlong.bank.snapshot.options import SavedOptions
from memlong.bank.store import KeyValueStore
from memlong.bank.table import ChunkTable
from memlong.errors import DeviceUnavailableError, InvalidArgumentError


class IndexHost(ABC):
    """A table of embeddings and the backend's index over it.

    Backends implement `_index_add`, `_index_search`, `_index_remove` and `_index_reset`. These may read
    `self._similarity` ("inner_product" or "l2"; under the cosine metric all vectors come in unit length or
    zero) and `self._table`, which holds the ids they are given: new ones already, leaving ones still. The
    arrays they get are only valid during the call. Add, remove and reset run alone, searches together.

    If one of them raises, or calls `_drop_index`, the index is rebuilt (reset, then one add of all chunks)
    before its next use. So an index may refuse what it cannot do well, and need never repair itself.

    To be saved with its options and its index, a backend also implements `_index_options`, `_index_save` and
    `_index_load`; without them it is loaded with default options, and the index is built anew. `saved_options` says
    which of its options a file may choose, which may be a stranger's; others are to be given when loading.

    Parameters
    ----------
    dim : int
        Width of the embeddings.
    similarity : "inner_product" or "l2"
        What to rank by.
    device : str or torch.device, optional
        Where the index computes, by default the CPU.
    store : KeyValueStore
        Holds the keys and values of the chunks in the table.
    """

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    """The device types that the backend's index can compute on."""

    saved_options: ClassVar[SavedOptions] = {}
    """Options of the backend's own that a snapshot or a decoder's folder may choose, each with the most that a number
    may be there, or None. Never one that names an address, a credential, a place to write to, or code."""

    def __init__(
        self, dim: int, similarity: Similarity, device: str | torch.device | None, store: KeyValueStore
    ) -> None:
        self._similarity: Similarity = similarity
        self._device = self._usable_device(device)
        self._table = ChunkTable(dim)
        self._store = store
        self._contents = Contents(self._table, store, self, type(self)._drop_index)  # noqa: SLF001 - its own
        self._lock = ReadWriteLock()
        self._index_is_current = True
        tell_after_fork(self)

    def after_fork(self) -> None:
        """Go on without the threads that only the parent has; what one of them was changing is undone before any use.

        The index of a library may hold locks of theirs: it is built anew. torch computes with one thread from here on,
        as in its own data loaders' workers: it would wait for threads of the parent's for ever. A backend whose library
        does likewise extends this.
        """
        torch.set_num_threads(1)
        if self._lock.without_others():
            self._drop_index()

    @abstractmethod
    def _index_add(self, ids: Ids, embeddings: Floats) -> None:
        """Take up n >= 1 new chunks: ids int64 [n], ascending, above all others; float32 [n, dim]."""

    @abstractmethod
    def _index_search(self, queries: Floats, k: int) -> Ids:
        """Name candidates for the k best chunks of each of q >= 1 queries, float32 [q, dim].

        Returns int64 ids [q, c] in any order; more than k improve the recall, -1 and ids that have left count
        for nothing. 1 <= k <= the number of chunks. The base scores them; a query with fewer than k is
        searched again by brute force.
        """

    @abstractmethod
    def _index_remove(self, ids: Ids) -> None:
        """Forget n >= 1 chunks: ids int64 [n], ascending."""

    @abstractmethod
    def _index_reset(self) -> None:
        """Go back to the empty index."""

    def _index_options(self) -> dict[str, Any]:
        """Return the backend's own options as it was made with: text, numbers, True, False or None."""
        return {}

    def _index_save(self) -> tuple[Mapping[str, Any], bytes] | None:
        """Return the index as a file's content, with what JSON can hold of the rest; None to have it rebuilt.

        Searches may run at the same time.
        """
        return None

    def _index_load(self, facts: Mapping[str, Any], content: bytes) -> None:  # noqa: ARG002 - a backend's
        """Take over what `_index_save` returned for the chunks that are in the table; the index is as after a reset.

        A RuntimeError, ValueError, KeyError or TypeError says that it does not fit.
        """
        raise ValueError("it saves no index")

    def _drop_index(self) -> None:
        """Have the index rebuilt before its next use."""
        self._index_is_current = False

    def _usable_device(self, device: str | torch.device | None) -> torch.device:
        """Return the device asked for, or raise; a backend extends this with what it needs."""
        try:
            chosen = torch.device("cpu" if device is None else device)
        except (RuntimeError, TypeError) as error:
            raise InvalidArgumentError(f"device {device!r} is not the name of a torch device") from error
        if chosen.type not in self.devices:
            raise DeviceUnavailableError(
                f"{type(self).__name__} cannot compute on {chosen}; it can on: {', '.join(self.devices)}"
            )
        return chosen

    @contextmanager
    def _reading(self, *, searching: bool = False) -> Iterator[None]:
        """Hold the lock together with other readers; to search, with an index that is current."""
        while True:
            with self._lock.read():
                if not self._contents.in_doubt and (self._index_is_current or not searching):
                    yield
                    return
            with self._lock.write():
                self._contents.mend()
                if searching:
                    self._rebuild_index()

    def _rebuild_index(self) -> None:
        if self._index_is_current:
            return
        self._index_reset()
        if len(self._table):
            self._index_add(self._table.ids, self._table.embeddings)
        self._index_is_current = True

    def _change_index(self, change: Callable[..., None], *arguments: Ids | Floats) -> None:
        if not self._index_is_current:
            return
        try:
            change(*arguments)
        except BaseException:
            self._drop_index()
            raise

    def _rank(self, queries: Floats, k: int) -> Ranking:
        have = min(k, len(self._table))
        if not have or not len(queries):
            return missing(len(queries), k)
        candidates = self._index_search(queries, have)
        found = rank(self._table, self._similarity, queries, candidates, k)
        short = found.rows[:, have - 1] < 0
        if short.any():
            rest = self._rank_exactly(queries[short], k)
            for ours, theirs in (
                (found.scores, rest.scores),
                (found.ids, rest.ids),
                (found.rows, rest.rows),
            ):
                ours[short] = theirs
        return found

    def _rank_exactly(self, queries: Floats, k: int) -> Ranking:
        if not len(self._table) or not len(queries):
            return missing(len(queries), k)
        return rank_exactly(self._table, self._similarity, queries, k)
