"""MemoryBank: what a memory of chunks is, whichever index searches it."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, Protocol, TypedDict, get_args
from weakref import ref

import numpy as np
import torch

from memlong.bank.arrays import FloatInput, Floats, Ids, IntInput
from memlong.bank.capacity import Capacity
from memlong.bank.eviction import EvictionPolicy, Usage, eviction_policy
from memlong.bank.finite import Finiteness
from memlong.bank.forks import fork_lock
from memlong.bank.layout import ChunkLayout
from memlong.bank.persistent import PersistentBank, SavedBank
from memlong.bank.results import Chunks, Retrieved, SearchResult, StoredEmbeddings
from memlong.bank.snapshot.writer import SnapshotWriter
from memlong.bank.store.gather import gather
from memlong.bank.store.store import InMemoryStore, KeyValueStore
from memlong.bank.validate import blocks_of, embeddings_of, ids_of, spans_of, whole_number
from memlong.errors import InvalidArgumentError

Metric = Literal["cosine", "inner_product", "l2"]


class Reader(Protocol):
    """Who reads text and stores it in a bank, a window later."""

    def unstored(self, bank: MemoryBank) -> int:
        """How many tokens it has read that are still to be stored there."""


class BankOptions(TypedDict, total=False):
    """The options every bank takes, for subclasses to pass through; see `MemoryBank`."""

    metric: Metric
    max_chunks: int | None
    max_bytes: int | str | None
    eviction: str | EvictionPolicy
    store: KeyValueStore | None
    device: str | torch.device | None


class MemoryBank(PersistentBank):
    """The memory of one token stream: chunks found by embedding, each with its keys, values and span.

    It owns ids, embeddings, spans, usage counts and (through its store) keys and values; it validates, locks, scores
    and evicts. A backend is an `Index`, which only names likely candidates and can be rebuilt at any time; `bank_of`
    makes a class of banks of it, and `create_bank` a bank by its name. Where an engine keeps more than an index, a
    backend is a subclass of `MemoryBank`. Many threads may search while one writes.

    With CUDA, a bank gives work to the current stream of whoever calls it; who calls it from several streams orders
    them, as for any tensor. A forked process cannot use a bank with anything on a device: CUDA does not survive it.

    Parameters
    ----------
    dim : int
        Width of the embeddings, at most 2**20, as in a snapshot.
    metric : {"cosine", "inner_product", "l2"}, default "cosine"
        What is near. Higher scores are better for each of them; "l2" is the negative squared distance.
    max_chunks : int, optional
        Capacity in chunks.
    max_bytes : int or str, optional
        Capacity in bytes of embeddings and K-V, such as "8GB". Whichever is reached first counts.
    eviction : str or EvictionPolicy, default "fifo"
        Which chunks leave a bank that is over its capacity: "fifo", "lru", "retrieval_frequency".
    store : KeyValueStore, optional
        Where keys and values live: an empty store, this bank's alone; by default in memory, on their device.
    device : str or torch.device, optional
        Where the index computes, by default the CPU. Keys and values stay where they come in.
    **index_options
        Options of the index.

    Attributes
    ----------
    origin : mapping or None
        Which model made the chunks, with which settings and retriever, as the decoder that added the first has said;
        None where nobody has. It is saved with the bank, and a decoder takes no bank of another origin.

    Raises
    ------
    InvalidArgumentError
        If an option has a value that cannot be used.
    DeviceUnavailableError
        If the backend cannot use the device.
    """

    def __init__(
        self,
        dim: int,
        *,
        metric: Metric = "cosine",
        max_chunks: int | None = None,
        max_bytes: int | str | None = None,
        eviction: str | EvictionPolicy = "fifo",
        store: KeyValueStore | None = None,
        device: str | torch.device | None = None,
        **index_options: Any,
    ) -> None:
        if not hasattr(type(self), "index_class"):
            raise InvalidArgumentError(
                "a MemoryBank needs an index: make one by its backend's name, as create_bank('torch', dim) does"
            )
        dim = whole_number("dim", dim, at_least=1, at_most=2**20)
        if metric not in get_args(Metric):
            raise InvalidArgumentError(f"metric must be one of {', '.join(get_args(Metric))}, got {metric!r}")
        store = InMemoryStore() if store is None else store
        if not isinstance(store, KeyValueStore):
            raise InvalidArgumentError(
                f"store must be a KeyValueStore, such as TieredStore(host='2GB', disk='/tmp'), got {store!r}"
            )
        if len(store):
            raise InvalidArgumentError(f"store must be empty, got one of {len(store)} blocks")
        self._capacity = Capacity(max_chunks, max_bytes, eviction_policy(eviction))
        self._dim = dim
        self._metric: Metric = metric
        super().__init__(dim, "l2" if metric == "l2" else "inner_product", device, store, index_options)
        self._counting = fork_lock()
        self.origin = None
        self._reader: ref[Reader] | None = None
        self._unproven: list[tuple[Ids, Finiteness]] = []

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._dim

    @property
    def metric(self) -> Metric:
        """What is near."""
        return self._metric

    @property
    def device(self) -> torch.device:
        """Where the index computes."""
        return self._device

    @property
    def unstored(self) -> int:
        """How many tokens a decoder holds in its window that it has still to store here."""
        reader = self._reader and self._reader()
        return reader.unstored(self) if reader else 0

    def is_read_into(self, reader: Reader) -> None:
        """Note who reads into the bank, for `unstored`; not kept."""
        self._reader = ref(reader)

    def refuse_changes(self, why: str) -> None:
        """From now on raise MemlongError, for this reason, at whatever would change the bank."""
        self._lock.why_closed = why

    @property
    def next_id(self) -> int:
        """The id that the next chunk will get."""
        return self._contents.next_id

    @property
    def layout(self) -> ChunkLayout | None:
        """Shape, dtype and device of a chunk's keys and of its values; None before the first add."""
        return self._contents.layout

    @property
    def nbytes(self) -> int:
        """Bytes of the embeddings, keys and values held."""
        with self._reading():
            return self._table.nbytes + self._store.nbytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of them in memory: what a store keeps on disk is not, and what it copies nearer counts twice."""
        with self._reading():
            return self._table.nbytes + self._store.resident_bytes

    @property
    def open_files(self) -> int:
        """How many files the store keeps open."""
        return self._store.open_files

    @property
    def ids(self) -> torch.Tensor:
        """The ids held, int64 [n], ascending; a copy."""
        with self._reading():
            return torch.from_numpy(self._table.ids.copy())

    @property
    def embeddings(self) -> StoredEmbeddings:
        """Ids and embeddings as they are searched; a copy."""
        with self._reading():
            ids, embeddings = self._table.ids.copy(), self._table.embeddings.copy()
        return StoredEmbeddings(torch.from_numpy(ids), torch.from_numpy(embeddings))

    @property
    def usage(self) -> Usage:
        """Ids, retrieval counts and last uses, as an eviction policy sees them; a copy."""
        with self._reading(), self._counting:
            usage = self._table.usage
            return Usage(usage.ids.copy(), usage.retrievals.copy(), usage.last_used.copy())

    def __len__(self) -> int:
        with self._reading():
            return len(self._table)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(dim={self._dim}, metric={self._metric!r}, chunks={len(self)})"

    def check_layout(self, layout: ChunkLayout) -> None:
        """Find out, before there are any, whether the bank and its store can hold chunks of a layout.

        Parameters
        ----------
        layout : ChunkLayout
            Of the chunks to come.

        Raises
        ------
        InvalidArgumentError
            If `max_bytes`, or the budget of one of the store's tiers, is too small for one chunk: it could never
            hold any.
        """
        self._store.check_layout(layout)
        self._capacity_for(layout)

    def add(
        self,
        embeddings: FloatInput,
        keys: FloatInput,
        values: FloatInput,
        spans: IntInput,
        *,
        check_first: bool = True,
    ) -> torch.Tensor:
        """Store chunks, and evict what is then over capacity; if this raises, the bank is as before.

        After an interrupt (KeyboardInterrupt) the chunks are all there or none is, and some of those that were to be
        evicted may be gone.

        Parameters
        ----------
        embeddings : torch.Tensor or numpy.ndarray
            [n, dim], any float dtype, device and strides; copied, never changed. n may be 0.
        keys, values : torch.Tensor or numpy.ndarray
            [n, layers, kv_heads, chunk, head_dim]; copied, never changed. They stay in the dtype and on the
            device they come in, which all chunks of a bank share.
        spans : torch.Tensor, numpy.ndarray or sequence of pairs
            Integers [n, 2], the token positions [start, end) of each chunk.
        check_first : bool, default True
            Know that keys and values are finite before anything is stored. Where they are on a CUDA device, that is
            one wait for all that it has been given to do. With False they are stored at once, and it is the next
            `add`, `remove`, `evict` or `save` that raises, if they are not, after it has removed them: for a caller
            that made them on the device itself and goes on to give it work, as the decoder does. On the CPU it makes
            no difference.

        Returns
        -------
        torch.Tensor
            int64 [n], ascending from 0 over the bank's life and never reused. Where more chunks come than the
            capacity allows, some of these may be evicted again at once.

        Raises
        ------
        InvalidArgumentError
            If an argument has a wrong type, shape or value, chunks differ in kind from earlier ones, or
            `max_bytes` is too small for one chunk; also if chunks that were added before with ``check_first=False``
            turn out not to be finite.
        """
        vectors = embeddings_of("embeddings", embeddings, self._dim, unit=self._metric == "cosine")
        count = len(vectors)
        key_blocks, value_blocks = blocks_of(keys, values, count)
        positions = spans_of(spans, count)
        if not count:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        layout = ChunkLayout.of(key_blocks)
        finiteness = Finiteness(key_blocks, value_blocks)
        if check_first or finiteness.is_known:
            # Only the device knows what its numbers are, so to refuse them before anything is stored takes one wait:
            # less is not possible, and with a store on the host it would be no less, as the copies there need none.
            finiteness.require()
        with self._lock.write():
            self._contents.repair()
            self._prove()
            if self._contents.layout is not None:
                self._contents.layout.require_same(layout)
            ids = np.arange(self._contents.next_id, self._contents.next_id + count, dtype=np.int64)
            before, room = len(self._table), self._capacity_for(layout)
            is_full = room is not None and before + count > room
            victims = self._capacity.victims(self._table.usage_with(ids), room) if is_full else ids[:0]
            with self._contents.change(layout, ids):
                self._store.put(ids.tolist(), key_blocks, value_blocks)
                self._table.append(ids, vectors, positions)
                self._change_index(self._index.add, ids, self._table.embeddings[before:])
                self._discard(victims)
            if not check_first and not finiteness.is_known:
                self._unproven.append((ids, finiteness))
        return torch.from_numpy(ids)

    def search(self, queries: FloatInput, k: int) -> SearchResult:
        """Find the k best chunks of each query; does not count as a use.

        Parameters
        ----------
        queries : torch.Tensor or numpy.ndarray
            [q, dim], any float dtype, device and strides.
        k : int
            How many, >= 1.

        Raises
        ------
        InvalidArgumentError
            If an argument has a wrong type, shape or value.
        """
        prepared, k = self._prepare(queries, k)
        with self._reading(searching=True):
            found = self._rank(prepared, k)
        return SearchResult(torch.from_numpy(found.scores), torch.from_numpy(found.ids))

    def exact_search(self, queries: FloatInput, k: int) -> SearchResult:
        """Do what `search` does by brute force over the stored embeddings: the measure of recall."""
        prepared, k = self._prepare(queries, k)
        with self._reading():
            found = self._rank_exactly(prepared, k)
        return SearchResult(torch.from_numpy(found.scores), torch.from_numpy(found.ids))

    def retrieve(self, queries: FloatInput, k: int) -> Retrieved:
        """Find the k best chunks of each query with their K-V, and count that for the eviction policy.

        Same arguments and errors as `search`. An id counts once for every query that it is returned for.
        """
        prepared, k = self._prepare(queries, k)
        with self._reading(searching=True):
            found = self._rank(prepared, k)
            keys, values = gather(self._store, self._contents.layout, found.ids)
            present = found.rows >= 0
            spans = np.full((*found.ids.shape, 2), -1, dtype=np.int64)
            spans[present] = self._table.spans[found.rows[present]]
            with self._counting:
                self._table.mark_retrieved(found.rows[present])
        ids, scores, where = (torch.from_numpy(each) for each in (found.ids, found.scores, spans))
        return Retrieved(ids, scores, keys, values, where)

    def spans_of(self, ids: IntInput) -> torch.Tensor:
        """Return the token positions [start, end) of chunks, int64 [n, 2]; -1 for an id that is not held."""
        wanted = ids_of(ids)
        with self._reading():
            rows = self._table.rows_of(wanted)
            spans = np.full((len(wanted), 2), -1, dtype=np.int64)
            spans[rows >= 0] = self._table.spans[rows[rows >= 0]]
        return torch.from_numpy(spans)

    def fetch(self, ids: IntInput) -> Chunks:
        """Return chunks by id, and count that as `retrieve` does; ids that the bank does not hold are left out.

        Parameters
        ----------
        ids : torch.Tensor, numpy.ndarray or sequence of int
            Distinct ids [n].
        """
        wanted = ids_of(ids)
        with self._reading():
            rows = self._table.rows_of(wanted)
            held, rows = wanted[rows >= 0], rows[rows >= 0]
            keys, values = gather(self._store, self._contents.layout, held)
            spans = self._table.spans[rows].copy()
            with self._counting:
                self._table.mark_retrieved(rows)
        return Chunks(torch.from_numpy(held), keys, values, torch.from_numpy(spans))

    def evict(self, n: int) -> torch.Tensor:
        """Let the eviction policy remove at least n chunks (all, if there are no more), as on overflow.

        Parameters
        ----------
        n : int
            How many, >= 0.

        Returns
        -------
        torch.Tensor
            int64, the evicted ids, ascending; more than n if the policy goes further, as
            "retrieval_frequency" does.
        """
        n = whole_number("n", n, at_least=0)
        with self._lock.write():
            self._contents.repair()
            self._prove()
            victims = self._capacity.victims(self._table.usage, max(len(self._table) - n, 0))
            with self._contents.change(self._contents.layout):
                self._discard(victims)
        return torch.from_numpy(victims)

    def remove(self, ids: IntInput) -> None:
        """Remove the chunks with these ids.

        Raises
        ------
        InvalidArgumentError
            If the bank does not hold one of them; nothing is removed then.
        """
        leaving = np.unique(ids_of(ids))
        with self._lock.write():
            self._contents.repair()
            self._prove()
            unknown = leaving[self._table.rows_of(leaving) < 0]
            if len(unknown):
                raise InvalidArgumentError(
                    f"ids {unknown.tolist()} are not in the bank (never added, or gone); nothing was removed"
                )
            with self._contents.change(self._contents.layout):
                self._discard(leaving)

    def reset(self) -> None:
        """Remove every chunk and forget the chunk shape; ids go on from where they were."""
        with self._lock.write():
            self._contents.restore()
            self._drop_index()
            self._unproven.clear()
            self.origin = None
            with self._contents.change(None):
                self._table.clear()
                self._store.clear()
            self._rebuild_index()

    def write_snapshot(self, writer: SnapshotWriter, *, compact: bool = False) -> SavedBank:
        """Write what a state of a folder needs of this bank; `keep_saved` follows when the state is current."""
        with self._lock.write():
            self._contents.repair()
            self._prove()
        return super().write_snapshot(writer, compact=compact)

    def _prepare(self, queries: FloatInput, k: int) -> tuple[Floats, int]:
        k = whole_number("k", k, at_least=1)
        return embeddings_of("queries", queries, self._dim, unit=self._metric == "cosine"), k

    def _prove(self) -> None:
        """Remove chunks that were stored unchecked and turn out not to be finite, and tell of the first."""
        while self._unproven:
            ids, finiteness = self._unproven[0]
            try:
                finiteness.require()
            except InvalidArgumentError as error:
                with self._contents.change(self._contents.layout):
                    self._discard(ids[self._table.rows_of(ids) >= 0])
                self._unproven.pop(0)
                raise InvalidArgumentError(
                    f"chunks {ids.tolist()}, added with check_first=False, are removed again: {error}"
                ) from error
            self._unproven.pop(0)

    def _discard(self, ids: Ids) -> None:
        if not len(ids):
            return
        self._change_index(self._index.remove, ids)
        self._table.remove(self._table.rows_of(ids))
        self._store.remove(ids.tolist())


@cache
def bank_of(maker: type) -> type[MemoryBank]:
    """Return the class of banks that search by an index; a class of banks is returned as it is."""
    if issubclass(maker, MemoryBank):
        return maker
    name = f"{maker.__name__.removesuffix('Index')}Bank"
    return type(name, (MemoryBank,), {"index_class": maker, "maker": maker, "__module__": maker.__module__})
