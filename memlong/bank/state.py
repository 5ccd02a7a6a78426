"""BankState: what a bank is made of, and what keeps its parts in step."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

from memlong.bank.arrays import Floats, Ids
from memlong.bank.capacity import Capacity
from memlong.bank.contents import Contents
from memlong.bank.finite import Finiteness
from memlong.bank.forks import fork_lock, tell_after_fork
from memlong.bank.index.index import Index, IndexRows
from memlong.bank.index.ranking import Ranking, missing, only, rank, rank_exactly, width_among
from memlong.bank.index.table import ChunkTable
from memlong.bank.layout import ChunkLayout
from memlong.bank.lock import ReadWriteLock
from memlong.bank.metric import Metric, similarity_of
from memlong.bank.results import Chunks, Retrieved, SearchResult
from memlong.bank.snapshot.segments import SavedBank
from memlong.bank.store.gather import gather
from memlong.bank.store.store import KeyValueStore
from memlong.bank.warn import warn_caller
from memlong.errors import InvalidArgumentError, LostChunksError, LostChunksWarning

Result = TypeVar("Result")


class BankState:
    """The parts of one bank. `MemoryBank` works on them, and so do the functions that save and load it.

    `search`, `retrieve`, `fetch` and `surviving` take the lock themselves. Of the others, those that change something
    are called with it held for writing, those that look with it held for reading.

    Parameters
    ----------
    dim : int
        Width of the embeddings.
    metric : {"cosine", "inner_product", "l2"}
        What counts as near.
    capacity : Capacity
        How much it may hold.
    store : KeyValueStore
        Holds the keys and values of the chunks in the table.
    device : torch.device
        Where the index computes.
    make_index : callable
        Makes the index over the rows that it is given.

    Attributes
    ----------
    table : ChunkTable
        Ids, embeddings, spans and usage.
    contents : Contents
        Table and store, changed together or not at all.
    index : Index
        Finds rows of the table.
    lock : ReadWriteLock
        Many readers, or one writer.
    counting : threading.Lock
        Held while usage is counted, which readers do.
    unproven : list
        Chunks that were stored before it was known whether they are finite.
    identity : str
        32 random hexadecimal digits, which the bank has had since it was made.
    origin : mapping or None
        Which model made the chunks.
    saved : SavedBank or None
        What is on disk of the bank.
    """

    def __init__(
        self,
        dim: int,
        metric: Metric,
        capacity: Capacity,
        store: KeyValueStore,
        device: torch.device,
        make_index: Callable[[IndexRows], Index[Any]],
    ) -> None:
        self.dim = dim
        self.metric: Metric = metric
        self.capacity = capacity
        self.store = store
        self.device = device
        self.table = ChunkTable(dim)
        self.contents = Contents(self.table, store, self, BankState.drop_index)
        self.lock = ReadWriteLock()
        self.counting = fork_lock()
        self.unproven: list[tuple[Ids, Finiteness]] = []
        self.identity = secrets.token_hex(16)
        self.origin: Mapping[str, Any] | None = None
        self.saved: SavedBank | None = None
        self._fingerprint: tuple[tuple[Any, ...], str] = (), ""
        self._index_is_current = True
        self.index = make_index(IndexRows(self.table, dim, similarity_of(metric), device))
        self.index.reset()
        tell_after_fork(self)

    def after_fork(self) -> None:
        """Drop what only the parent's other threads could finish; what one of them was changing is undone before use.

        The index of a library may hold locks of theirs, so it is rebuilt. From here on torch computes with one thread,
        as in the workers of its data loaders: it would wait forever for the parent's threads.
        """
        torch.set_num_threads(1)
        if self.lock.without_others():
            self.drop_index()
        self.index.after_fork()

    @contextmanager
    def reading(self, *, searching: bool = False) -> Iterator[None]:
        """Hold the lock together with other readers; to search, with an index that is current."""
        while True:
            with self.lock.read():
                if not self.contents.in_doubt and (self._index_is_current or not searching):
                    yield
                    return
            with self.lock.write():
                self.contents.repair()
                if searching:
                    self.rebuild_index()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock alone, with what an earlier change left in doubt settled."""
        with self.lock.write():
            self.contents.repair()
            self.remove_unproven()
            yield

    def drop_index(self) -> None:
        """Have the index rebuilt before its next use."""
        self._index_is_current = False

    def rebuild_index(self) -> None:
        """Make the index current."""
        if self._index_is_current:
            return
        self.index.reset()
        if len(self.table):
            self.index.add(self.table.ids, self.table.embeddings)
        self._index_is_current = True

    def load_index(self, facts: Mapping[str, Any], content: bytes) -> None:
        """Take an index that `Index.dump` returned for the present rows; raises what the library raises."""
        self.index.load(facts, content)
        self._index_is_current = True

    def insert(self, layout: ChunkLayout, embeddings: Floats, keys: Any, values: Any, spans: Ids) -> Ids:
        """Add chunks, remove what is then over capacity, and return the new ids."""
        table, first = self.table, self.contents.next_id
        ids = np.arange(first, first + len(embeddings), dtype=np.int64)
        before, limit = len(table), self.capacity_for(layout)
        is_full = limit is not None and before + len(ids) > limit
        victims = self.capacity.victims(table.usage_with(ids), limit) if is_full else ids[:0]
        with self.contents.change(layout, ids):
            self.store.put(ids.tolist(), keys, values)
            table.append(ids, embeddings, spans)
            self._change_index(self.index.add, ids, table.embeddings[before:])
            self._discard(victims)
        return ids

    def remove(self, ids: Ids) -> None:
        """Remove chunks that the bank holds, ascending ids."""
        with self.contents.change(self.contents.layout):
            self._discard(ids)

    def fill(
        self,
        ids: Ids,
        embeddings: Floats,
        spans: Ids,
        layout: ChunkLayout | None,
        next_id: int,
        *,
        retrievals: Ids | None = None,
        last_used: Ids | None = None,
        clock: int | None = None,
    ) -> None:
        """Begin with chunks whose keys and values the store holds or is about to be given; the index is rebuilt.

        Without counts, none was ever retrieved, and the order of the ids is that of their last use.
        """
        count = len(ids)
        self.table.fill(
            ids,
            embeddings,
            spans,
            np.zeros(count, dtype=np.int64) if retrievals is None else retrievals,
            np.arange(1, count + 1) if last_used is None else last_used,
            count if clock is None else clock,
        )
        self.contents.fill(layout, next_id)
        self.drop_index()

    def fingerprint(self) -> str:
        """Return the SHA-256 of ids, spans, embeddings, metric and origin, computed when they have changed."""
        table = self.table
        # Ids are never used again, so this tells any two states of a bank apart.
        now = self.contents.next_id, len(table), json.dumps([self.metric, self.origin], sort_keys=True)
        if self._fingerprint[0] != now:
            found = hashlib.sha256(now[2].encode())
            for each in (table.ids, table.spans, table.embeddings):
                found.update(np.ascontiguousarray(each).data)
            self._fingerprint = now, found.hexdigest()
        return self._fingerprint[1]

    def clear(self) -> None:
        """Remove every chunk, and forget the layout; ids continue."""
        self.contents.restore()
        if self.index.repairs_before_changes and len(self.table):
            # First, as it may refuse: nothing has changed then.
            self._change_index(self.index.remove, self.table.ids)
        self.drop_index()
        self.unproven.clear()
        self.origin = None
        with self.contents.change(None):
            self.table.clear()
            self.store.clear()
        self.rebuild_index()

    def remove_unproven(self) -> None:
        """Remove chunks that were stored unchecked and are not finite, and raise InvalidArgumentError for the first."""
        while self.unproven:
            ids, finiteness = self.unproven[0]
            try:
                finiteness.require()
            except InvalidArgumentError as error:
                self.remove(ids[self.table.rows_of(ids) >= 0])
                self.unproven.pop(0)
                raise InvalidArgumentError(
                    f"chunks {ids.tolist()}, added with check_first=False, are removed again: {error}"
                ) from error
            self.unproven.pop(0)

    def surviving(self, act: Callable[[], Result]) -> Result:
        """Do something that reads keys and values; chunks whose blocks turn out to be lost leave, with a warning."""
        while True:
            try:
                return act()
            except LostChunksError as error:
                ids = np.array(sorted(error.reasons), dtype=np.int64)
                with self.writing():
                    lost = ids[self.table.rows_of(ids) >= 0]
                    if not len(lost):
                        raise  # the store names others than the bank's: to try again would not end
                    self.remove(lost)
                warn_caller(f"{error}. The bank has forgotten them", LostChunksWarning)

    def search(
        self, queries: Floats, k: int, among: Ids | None = None, *, exactly: bool = False
    ) -> SearchResult:
        """Return the k best chunks of each query, by the index or by brute force, of all or `among` some ids."""
        with self.reading(searching=not exactly):
            found = (self._rank_exactly if exactly else self._rank)(queries, k, self._rows_among(among))
        return SearchResult(torch.from_numpy(found.scores), torch.from_numpy(found.ids))

    def retrieve(self, queries: Floats, k: int, among: Ids | None = None) -> Retrieved:
        """Return the k best chunks of each query, of all or `among` some ids, and count that."""
        with self.reading(searching=True):
            found = self._rank(queries, k, self._rows_among(among))
            keys, values = gather(self.store, self.contents.layout, found.ids)
            present = found.rows >= 0
            spans = np.full((*found.ids.shape, 2), -1, dtype=np.int64)
            spans[present] = self.table.spans[found.rows[present]]
            with self.counting:
                self.table.mark_retrieved(found.rows[present])
        ids, scores, where = (torch.from_numpy(each) for each in (found.ids, found.scores, spans))
        return Retrieved(ids, scores, keys, values, where)

    def fetch(self, ids: Ids, known: Ids) -> Chunks:
        """Return those of the chunks that are held, and count that, and the use of others that are ``known``."""
        with self.reading():
            rows = self.table.rows_of(ids)
            held, rows = ids[rows >= 0], rows[rows >= 0]
            keys, values = gather(self.store, self.contents.layout, held)
            spans = self.table.spans[rows].copy()
            others = self.table.rows_of(known)
            with self.counting:
                self.table.mark_retrieved(np.concatenate([rows, others[others >= 0]]))
        return Chunks(torch.from_numpy(held), keys, values, torch.from_numpy(spans))

    def capacity_for(self, layout: ChunkLayout) -> int | None:
        """Return how many chunks of a layout fit, None for any number; InvalidArgumentError if not one does."""
        return self.capacity.in_chunks(*self.chunk_bytes(layout), self.store.max_bytes)

    def chunk_bytes(self, layout: ChunkLayout) -> tuple[int, int]:
        """Return the bytes of a chunk's embedding, and of its keys and values in the store."""
        return self.dim * np.dtype(np.float32).itemsize, self.store.record_bytes(layout)

    def _change_index(self, change: Callable[..., bool | None], *arguments: Ids | Floats) -> None:
        if self.index.repairs_before_changes:
            self.rebuild_index()
        if not self._index_is_current:
            return
        try:
            is_good = change(*arguments)
        except BaseException:
            self.drop_index()
            raise
        if is_good is not None and not is_good:  # False may be NumPy's
            self.drop_index()

    def _discard(self, ids: Ids) -> None:
        if not len(ids):
            return
        self._change_index(self.index.remove, ids)
        self.table.remove(self.table.rows_of(ids))
        self.store.remove(ids.tolist())

    def _rows_among(self, ids: Ids | None) -> Ids | None:
        """Return the rows of the ids that may be found, ascending; None for all."""
        if ids is None:
            return None
        rows = self.table.rows_among(ids)
        return None if len(rows) == len(self.table) else rows

    def _rank(self, queries: Floats, k: int, among: Ids | None) -> Ranking:
        """Return the k best rows of each query, of all or `among` some.

        The index names them; brute force finds them where it names too few, or where few rows are allowed.
        """
        table, similarity = self.table, self.index.rows.similarity
        have = min(k, len(table if among is None else among))
        if not have or not len(queries):
            return missing(len(queries), k)
        if among is None:
            found = rank(table, similarity, queries, self.index.search(queries, have), k)
        elif (width := width_among(have, among, len(table))) is None:
            return self._rank_exactly(queries, k, among)
        else:
            found = rank(table, similarity, queries, self.index.search(queries, width), width)
            found = only(table, found, among, k)
        short = found.rows[:, have - 1] < 0
        if short.any():
            rest = self._rank_exactly(queries[short], k, among)
            for ours, theirs in (
                (found.scores, rest.scores),
                (found.ids, rest.ids),
                (found.rows, rest.rows),
            ):
                ours[short] = theirs
        return found

    def _rank_exactly(self, queries: Floats, k: int, among: Ids | None) -> Ranking:
        """Return the k best rows of each query by brute force, of all or `among` some."""
        if not len(self.table if among is None else among) or not len(queries):
            return missing(len(queries), k)
        return rank_exactly(self.table, self.index.rows.similarity, queries, k, among)
