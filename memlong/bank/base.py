"""MemoryBank: what a memory of chunks is, whichever index searches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypedDict, get_args
from weakref import ref

import numpy as np
import torch

from memlong.bank.arrays import FloatInput, Floats, Ids, IntInput
from memlong.bank.capacity import Capacity
from memlong.bank.eviction import EvictionPolicy, Usage, eviction_policy
from memlong.bank.finite import Finiteness
from memlong.bank.index.index import Index, IndexRows
from memlong.bank.layout import ChunkLayout
from memlong.bank.metric import Metric
from memlong.bank.of_class import of_class
from memlong.bank.results import Chunks, Retrieved, SearchResult, StoredEmbeddings
from memlong.bank.snapshot.loading import load
from memlong.bank.snapshot.options import SavedOptions, options_to_save
from memlong.bank.snapshot.reader import StoredBank, folder_of, open_snapshot, read_bank
from memlong.bank.snapshot.saving import save
from memlong.bank.snapshot.whole import packed, unpacked
from memlong.bank.state import BankState
from memlong.bank.store.codec import StorageDtype
from memlong.bank.store.store import InMemoryStore, KeyValueStore
from memlong.bank.store.tiers import TieredStore
from memlong.bank.validate import blocks_of, embeddings_of, ids_of, spans_of, whole_number
from memlong.errors import InvalidArgumentError

_ENOUGH = 1024  # embeddings for a mean


class Reader(Protocol):
    """A reader of text that stores it in a bank once it has left the window."""

    def unstored(self, bank: MemoryBank) -> int:
        """How many tokens it has read that are not stored there yet."""


class BankOptions(TypedDict, total=False):
    """The options every bank takes, for subclasses to pass through; see `MemoryBank`."""

    metric: Metric
    max_chunks: int | None
    max_bytes: int | str | None
    eviction: str | EvictionPolicy
    store: KeyValueStore | None
    device: str | torch.device | None


class MemoryBank:
    """The memory of one token stream: chunks found by embedding, each with its keys, values and span.

    It owns ids, embeddings, spans, usage counts and (through its store) keys and values; it validates, locks, scores
    and evicts. A backend is an `Index`, which only names likely candidates and can be rebuilt at any time; `bank_of`
    makes a class of banks from it, and `create_bank` a bank by its name. An engine that keeps more than an index is a
    subclass of `MemoryBank` instead. Many threads may search while one writes.

    With CUDA, a bank works on the caller's current stream; callers on several streams must order them, as for any
    tensor. CUDA does not survive a fork, so a forked process cannot use a bank with anything on a device.

    Parameters
    ----------
    dim : int
        Width of the embeddings, at most 2**20, as in a snapshot.
    metric : {"cosine", "inner_product", "l2"}, default "cosine"
        What counts as near. Higher scores are better for each of them; "l2" is the negative squared distance.
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

    Raises
    ------
    InvalidArgumentError
        If an option has a value that cannot be used.
    DeviceUnavailableError
        If the backend cannot use the device.
    """

    index_class: ClassVar[type[Index[Any]]]
    """What finds the chunks."""

    saved_options: ClassVar[SavedOptions] = {}
    """Options that a snapshot, possibly an untrusted one, may set, each with its maximum there, or None."""

    maker: ClassVar[type]
    """The class that snapshots name: that of the index, or of the bank where it is more than its index."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "index_class" in vars(cls) and "saved_options" not in vars(cls):
            cls.saved_options = cls.index_class.saved_options()
        if "maker" not in vars(cls):
            cls.maker = cls

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
        self._state = BankState(
            dim,
            metric,
            Capacity(max_chunks, max_bytes, eviction_policy(eviction)),
            store,
            self.index_class.usable_device(device),
            lambda rows: self.make_index(rows, index_options),
        )
        self._reader: ref[Reader] | None = None

    def make_index(self, rows: IndexRows, options: Mapping[str, Any]) -> Index[Any]:
        """Make the index, once; a bank whose index needs more than its options overrides this."""
        return self.index_class(rows, self.index_class.make_options(options))

    def options_to_save(self) -> dict[str, Any]:
        """Return the backend's own options for a snapshot."""
        return options_to_save(self._state.index.options_to_save(), self.saved_options)

    @property
    def top(self) -> MemoryBank:
        """The bank that changes go to: itself, unless it is layered."""
        return self

    @property
    def bases(self) -> tuple[MemoryBank, ...]:
        """The read-only banks below it: none, unless it is layered."""
        return ()

    @property
    def among(self) -> tuple[Ids | None, ...]:
        """For each of them the ids of the chunks that can be found there, ascending, or None for all."""
        return ()

    @property
    def identity(self) -> str:
        """Which bank this is: 32 random hexadecimal digits, which its snapshots and copies keep, whatever it holds.

        A session that was saved over it can be loaded over it again when it has changed.
        """
        return self._state.identity

    @property
    def state(self) -> BankState:
        """What the bank is made of; for a subclass, and for what saves and loads banks."""
        return self._state

    @property
    def index(self) -> Index[Any]:
        """What finds the chunks; the bank's alone to change."""
        return self._state.index

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._state.dim

    @property
    def metric(self) -> Metric:
        """What counts as near."""
        return self._state.metric

    @property
    def device(self) -> torch.device:
        """Where the index computes."""
        return self._state.device

    @property
    def origin(self) -> Mapping[str, Any] | None:
        """Which model made the chunks, with which settings and retriever, as the decoder that added the first has said.

        None where nobody has. It is saved with the bank, and a decoder takes no bank of another origin.
        """
        return self._state.origin

    @origin.setter
    def origin(self, origin: Mapping[str, Any] | None) -> None:
        self._state.origin = origin

    @property
    def unstored(self) -> int:
        """How many tokens a decoder holds in its window that are not stored here yet."""
        reader = self._reader and self._reader()
        return reader.unstored(self) if reader else 0

    def is_read_into(self, reader: Reader) -> None:
        """Note the reader that stores into this bank, for `unstored`; held weakly."""
        self._reader = ref(reader)

    def refuse_changes(self, why: str) -> None:
        """From now on, raise MemlongError with this reason for every change to the bank."""
        self._state.lock.why_closed = why

    @property
    def next_id(self) -> int:
        """The id that the next chunk will get."""
        return self._state.contents.next_id

    @property
    def layout(self) -> ChunkLayout | None:
        """Shape, dtype and device of a chunk's keys and of its values; None before the first add."""
        return self._state.contents.layout

    @property
    def nbytes(self) -> int:
        """Bytes of the embeddings, keys and values held."""
        with self._state.reading():
            return self._state.table.nbytes + self._state.store.nbytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of them in memory: blocks on disk do not count, and those that a store caches count twice."""
        with self._state.reading():
            return self._state.table.nbytes + self._state.store.resident_bytes

    @property
    def open_files(self) -> int:
        """How many files the store keeps open."""
        return self._state.store.open_files

    @property
    def ids(self) -> torch.Tensor:
        """The ids held, int64 [n], ascending; a copy."""
        with self._state.reading():
            return torch.from_numpy(self._state.table.ids.copy())

    @property
    def embeddings(self) -> StoredEmbeddings:
        """Ids and embeddings as they are searched; a copy."""
        with self._state.reading():
            ids, embeddings = self._state.table.ids.copy(), self._state.table.embeddings.copy()
        return StoredEmbeddings(torch.from_numpy(ids), torch.from_numpy(embeddings))

    def mean_embedding(self, more: Floats | None = None) -> torch.Tensor:
        """Return the mean [dim] of up to 1,024 embeddings, evenly spaced; 0 for no chunk.

        As it would be with ``more`` [n, dim] embeddings.
        """
        held, added = len(self), 0 if more is None else len(more)
        step = max(1, -(-(held + added) // _ENOUGH))
        total, count, _ = self.embedding_sum(0, step)
        if more is not None:
            chosen = more[-held % step :: step]
            total, count = total + chosen.sum(axis=0), count + len(chosen)
        return torch.from_numpy(total / max(1, count))

    def embedding_sum(self, start: int, step: int) -> tuple[Floats, int, int]:
        """Return the sum [dim] of every ``step``-th embedding from ``start`` on, their number, and that of all held."""
        with self._state.reading():
            held = self._state.table.embeddings
            chosen = held[start::step]
            return chosen.sum(axis=0), len(chosen), len(held)

    @property
    def usage(self) -> Usage:
        """Ids, retrieval counts and last uses, as an eviction policy sees them; a copy."""
        with self._state.reading(), self._state.counting:
            usage = self._state.table.usage
            return Usage(usage.ids.copy(), usage.retrievals.copy(), usage.last_used.copy())

    def __len__(self) -> int:
        with self._state.reading():
            return len(self._state.table)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(dim={self._state.dim}, metric={self._state.metric!r}, chunks={len(self)})"
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 of what the bank finds chunks by: ids, spans, embeddings and the model that made them."""
        with self._state.reading():
            return self._state.fingerprint()

    def check_layout(self, layout: ChunkLayout) -> None:
        """Check whether the bank and its store can hold chunks of a layout.

        Parameters
        ----------
        layout : ChunkLayout
            Layout of the chunks.

        Raises
        ------
        InvalidArgumentError
            If `max_bytes`, or the budget of one of the store's tiers, is too small for one chunk: it could never
            hold any.
        """
        self._state.store.check_layout(layout)
        self._state.capacity_for(layout)

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
            that made them on the device and keeps it busy, as the decoder does. On the CPU it makes no difference.

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
        vectors = embeddings_of(
            "embeddings", embeddings, self._state.dim, unit=self._state.metric == "cosine"
        )
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
        with self._state.writing():
            if self.layout is not None:
                self.layout.require_same(layout)
            ids = self._state.insert(layout, vectors, key_blocks, value_blocks, positions)
            if not check_first and not finiteness.is_known:
                self._state.unproven.append((ids, finiteness))
        return torch.from_numpy(ids)

    def search(self, queries: FloatInput, k: int, *, among: IntInput | None = None) -> SearchResult:
        """Find the k best chunks of each query; does not count as a use.

        Parameters
        ----------
        queries : torch.Tensor or numpy.ndarray
            [q, dim], any float dtype, device and strides.
        k : int
            How many, >= 1.
        among : torch.Tensor, numpy.ndarray or sequence of int, optional
            Ids [n] in any order, to find the best of these chunks alone, as if the bank held no others. Those that it
            does not hold are ignored; of none, nothing is found.

        Raises
        ------
        InvalidArgumentError
            If an argument has a wrong type, shape or value.
        """
        return self._state.search(*self._prepare(queries, k, among))

    def exact_search(self, queries: FloatInput, k: int, *, among: IntInput | None = None) -> SearchResult:
        """Search by brute force over the stored embeddings, as the reference for recall."""
        return self._state.search(*self._prepare(queries, k, among), exactly=True)

    def retrieve(self, queries: FloatInput, k: int, *, among: IntInput | None = None) -> Retrieved:
        """Find the k best chunks of each query with their K-V, and count that for the eviction policy.

        Same arguments and errors as `search`. An id counts once for every query that it is returned for.
        """
        prepared = self._prepare(queries, k, among)
        return self._state.surviving(lambda: self._state.retrieve(*prepared))

    def spans_of(self, ids: IntInput) -> torch.Tensor:
        """Return the token positions [start, end) of chunks, int64 [n, 2]; -1 for an id that is not held."""
        wanted = ids_of(ids)
        with self._state.reading():
            rows = self._state.table.rows_of(wanted)
            spans = np.full((len(wanted), 2), -1, dtype=np.int64)
            spans[rows >= 0] = self._state.table.spans[rows[rows >= 0]]
        return torch.from_numpy(spans)

    def embeddings_of(self, ids: IntInput) -> torch.Tensor:
        """Return the embeddings of chunks as they are searched, float32 [n, dim]; 0 for an id that is not held."""
        wanted = ids_of(ids)
        with self._state.reading():
            rows = self._state.table.rows_of(wanted)
            found = np.zeros((len(wanted), self._state.dim), dtype=np.float32)
            found[rows >= 0] = self._state.table.embeddings[rows[rows >= 0]]
        return torch.from_numpy(found)

    def fetch(self, ids: IntInput, *, known: IntInput = ()) -> Chunks:
        """Return chunks by id, and count that as `retrieve` does; ids that the bank does not hold are left out.

        Parameters
        ----------
        ids : torch.Tensor, numpy.ndarray or sequence of int
            Distinct ids [n].
        known : torch.Tensor, numpy.ndarray or sequence of int
            Other ids, which are counted alike but not returned: the caller still has their chunks.
        """
        wanted, others = ids_of(ids), ids_of(known)
        return self._state.surviving(lambda: self._state.fetch(wanted, others))

    def evict(self, n: int) -> torch.Tensor:
        """Have the eviction policy remove at least n chunks (all, if there are fewer), as on overflow.

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
        with self._state.writing():
            table = self._state.table
            victims = self._state.capacity.victims(table.usage, max(len(table) - n, 0))
            self._state.remove(victims)
        return torch.from_numpy(victims)

    def remove(self, ids: IntInput) -> None:
        """Remove the chunks with these ids.

        Raises
        ------
        InvalidArgumentError
            If the bank does not hold one of them; nothing is removed then.
        """
        leaving = np.unique(ids_of(ids))
        with self._state.writing():
            unknown = leaving[self._state.table.rows_of(leaving) < 0]
            if len(unknown):
                raise InvalidArgumentError(
                    f"ids {unknown.tolist()} are not in the bank (never added, or gone); nothing was removed"
                )
            self._state.remove(leaving)

    def reset(self) -> None:
        """Remove every chunk and forget the chunk shape; ids continue from where they were."""
        with self._state.lock.write():
            self._state.clear()

    def save(self, path: str | Path, *, compact: bool = False) -> None:
        """Write the bank into a folder, as a whole or, where it was saved there before, what has changed.

        The folder holds the previous state or this one, whenever the process ends. Many threads may search meanwhile;
        what writes waits. Chunks that have left the bank stay in the folder until half of those that were saved with
        them have left, too.

        Parameters
        ----------
        path : str or Path
            A folder, made if it does not exist. Another bank that was saved there is replaced.
        compact : bool, default False
            Rewrite everything, the index as well, so that nothing of chunks that have left remains.

        Raises
        ------
        SnapshotError
            If it cannot be written; the folder then holds what it did.
        InvalidArgumentError
            If an option of the bank cannot be written.
        """
        save(self, path, compact=compact)

    @of_class
    def load(
        cls,
        path: str | Path,
        *,
        row: int | None = None,
        lazy: bool = False,
        trust_index: bool = False,
        most_bytes: int | str | None = None,
        kv_device: str | None = None,
        **options: Any,
    ) -> Self:
        """Make a bank of this class of what was saved, whichever class that was.

        `memlong.load_bank` finds out which class the snapshot names.

        Parameters
        ----------
        path : str or Path
            The folder.
        row : int, optional
            Which bank, where a decoder of several rows was saved.
        lazy : bool, default False
            Leave keys and values on disk; each block is read, and checked, when it is needed.
        trust_index : bool, default False
            Take saved options beyond the bounds that hold for a stranger's, and read the index library's own file,
            where this class, with the same options, wrote one. These libraries read whatever they are given, and a file
            that was made to harm can: so use this with your own snapshots only. Otherwise the index is rebuilt from the
            embeddings.
        most_bytes : int or str, optional
            Refuse a snapshot whose files take more.
        kv_device : str, optional
            Where keys and values go, by default where they came from.
        **options
            Options of the bank that replace those saved. The backend's own are those saved only if this class saved
            them. `store` is where keys and values live from now on.

        Raises
        ------
        SnapshotError
            If the folder holds no snapshot, or one that is damaged or of another version.
        InvalidArgumentError
            If an option cannot be used.
        DeviceUnavailableError
            If a device is not there.
        """
        if not hasattr(cls, "index_class"):
            raise InvalidArgumentError(
                f"{cls.__name__} is not a backend: memlong.load_bank(path) makes a bank of the one that was saved, "
                "load_bank(path, backend='torch') of another"
            )
        folder = folder_of(path)
        return open_snapshot(
            folder,
            lambda manifest: cls.of_stored(
                read_bank(folder, manifest, row, kv_device), lazy=lazy, trust_index=trust_index, **options
            ),
            most_bytes,
        )

    @classmethod
    def of_stored(
        cls, stored: StoredBank, *, lazy: bool = False, trust_index: bool = False, **options: Any
    ) -> Self:
        """Make a bank of this class of what a snapshot holds; as `load`."""
        return load(cls, stored, options, lazy=lazy, trust_index=trust_index)

    def __reduce_ex__(self, _: object) -> tuple[Any, ...]:
        """A copy holds the same chunks, usage, options and index, with keys and values in memory, in as many bits."""
        options = {**asdict(self.index.options), "eviction": self._state.capacity.policy}
        return _unpacked, (self.maker, packed(self), options, self._state.store.storage_dtype)

    def _prepare(self, queries: FloatInput, k: int, among: IntInput | None) -> tuple[Floats, int, Ids | None]:
        k = whole_number("k", k, at_least=1)
        vectors = embeddings_of("queries", queries, self._state.dim, unit=self._state.metric == "cosine")
        return vectors, k, None if among is None else ids_of(among, "among")


@cache
def bank_of(maker: type) -> type[MemoryBank]:
    """Return the class of banks that search by an index; a class of banks is returned as it is."""
    if issubclass(maker, MemoryBank):
        return maker
    name = f"{maker.__name__.removesuffix('Index')}Bank"
    return type(name, (MemoryBank,), {"index_class": maker, "maker": maker, "__module__": maker.__module__})


def _unpacked(
    maker: type, files: Mapping[str, bytes], options: Mapping[str, Any], dtype: StorageDtype | None
) -> MemoryBank:
    """Make the copy of a bank, with keys and values in memory."""
    store: Mapping[str, Any] = {} if dtype is None else {"store": TieredStore(host="all", dtype=dtype)}
    with unpacked(files) as folder:
        return bank_of(maker).load(folder, trust_index=True, **options, **store)
