"""IndexHost: a table of embeddings, a store, and an index that is kept in step with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from memlong.bank.arrays import Floats, Ids
from memlong.bank.contents import Contents
from memlong.bank.forks import tell_after_fork
from memlong.bank.index.exact import Similarity
from memlong.bank.index.index import Index, IndexRows
from memlong.bank.index.ranking import Ranking, missing, rank, rank_exactly
from memlong.bank.index.table import ChunkTable
from memlong.bank.lock import ReadWriteLock
from memlong.bank.snapshot.options import SavedOptions
from memlong.bank.store.store import KeyValueStore


class IndexHost:
    """A table of embeddings and the index over it.

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
    options : mapping
        Of the index.
    """

    index_class: ClassVar[type[Index[Any]]]
    """What finds the chunks."""

    saved_options: ClassVar[SavedOptions] = {}
    """Options that a file may choose, which may be a stranger's, each with the most that it may ask for, or None."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "index_class" in vars(cls) and "saved_options" not in vars(cls):
            cls.saved_options = cls.index_class.saved_options()

    def __init__(
        self,
        dim: int,
        similarity: Similarity,
        device: str | torch.device | None,
        store: KeyValueStore,
        options: Mapping[str, Any],
    ) -> None:
        self._device = self.index_class.usable_device(device)
        self._table = ChunkTable(dim)
        self._store = store
        self._contents = Contents(self._table, store, self, type(self)._drop_index)  # noqa: SLF001 - its own
        self._lock = ReadWriteLock()
        self._index_is_current = True
        self._index = self.make_index(IndexRows(self._table, dim, similarity, self._device), options)
        self._index.reset()
        tell_after_fork(self)

    def make_index(self, rows: IndexRows, options: Mapping[str, Any]) -> Index[Any]:
        """Make the index, once; a bank whose index needs more than its options overrides this."""
        return self.index_class(rows, self.index_class.make_options(options))

    @property
    def index(self) -> Index[Any]:
        """What finds the chunks; the bank's alone to change."""
        return self._index

    def after_fork(self) -> None:
        """Go on without the threads that only the parent has; what one of them was changing is undone before any use.

        The index of a library may hold locks of theirs: it is rebuilt. torch computes with one thread from here on,
        as in its own data loaders' workers: it would wait for threads of the parent's for ever.
        """
        torch.set_num_threads(1)
        if self._lock.without_others():
            self._drop_index()
        self._index.after_fork()

    def _drop_index(self) -> None:
        """Have the index rebuilt before its next use."""
        self._index_is_current = False

    @contextmanager
    def _reading(self, *, searching: bool = False) -> Iterator[None]:
        """Hold the lock together with other readers; to search, with an index that is current."""
        while True:
            with self._lock.read():
                if not self._contents.in_doubt and (self._index_is_current or not searching):
                    yield
                    return
            with self._lock.write():
                self._contents.repair()
                if searching:
                    self._rebuild_index()

    def _rebuild_index(self) -> None:
        if self._index_is_current:
            return
        self._index.reset()
        if len(self._table):
            self._index.add(self._table.ids, self._table.embeddings)
        self._index_is_current = True

    def _change_index(self, change: Callable[..., bool | None], *arguments: Ids | Floats) -> None:
        if self._index.repairs_before_changes:
            self._rebuild_index()
        if not self._index_is_current:
            return
        try:
            is_good = change(*arguments)
        except BaseException:
            self._drop_index()
            raise
        if is_good is not None and not is_good:  # False may be NumPy's
            self._drop_index()

    def _rank(self, queries: Floats, k: int) -> Ranking:
        have = min(k, len(self._table))
        if not have or not len(queries):
            return missing(len(queries), k)
        similarity = self._index.rows.similarity
        found = rank(self._table, similarity, queries, self._index.search(queries, have), k)
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
        return rank_exactly(self._table, self._index.rows.similarity, queries, k)
