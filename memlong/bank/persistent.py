"""PersistentBank: what a bank does to be saved and loaded."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from memlong.bank.capacity import Capacity
from memlong.bank.eviction import saved_name
from memlong.bank.index.hosting import IndexHost
from memlong.bank.layout import ChunkLayout
from memlong.bank.of_class import of_class
from memlong.bank.snapshot.content import Content
from memlong.bank.snapshot.files import damaged, unwritable
from memlong.bank.snapshot.lazy import SnapshotStore
from memlong.bank.snapshot.manifest import BankRecord, IndexRecord
from memlong.bank.snapshot.options import options_to_save, refused_option
from memlong.bank.snapshot.reader import StoredBank, folder_of, layout_record, open_snapshot, read_bank
from memlong.bank.snapshot.segments import Segment, keepable, write_segments
from memlong.bank.snapshot.tensors import encode
from memlong.bank.snapshot.whole import packed, unpacked
from memlong.bank.snapshot.writer import SnapshotWriter
from memlong.errors import DeviceUnavailableError, InvalidArgumentError, SnapshotError

_OF_EVERY_BANK = {"metric", "max_chunks", "max_bytes", "eviction", "device", "store", "dim"}


@dataclass(frozen=True, eq=False)
class SavedBank:
    """What was written of a bank into a state of a folder that goes by ``token``."""

    token: str
    record: BankRecord
    segments: tuple[Segment, ...]


class PersistentBank(IndexHost):
    """Saving and loading; the parameters are those of `MemoryBank`, which sets what is declared here."""

    _dim: int
    _metric: str
    _capacity: Capacity
    _counting: threading.Lock
    _saved: SavedBank | None = None

    maker: ClassVar[type]
    """The class that snapshots name: that of the index, or of the bank where it is more than its index."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "maker" not in vars(cls):
            cls.maker = cls

    def options_to_save(self) -> dict[str, Any]:
        """Return the backend's own options for a snapshot."""
        return options_to_save(self._index.options_to_save(), self.saved_options)

    origin: Mapping[str, Any] | None

    def save(self, path: str | Path, *, compact: bool = False) -> None:
        """Write the bank into a folder, as a whole or, where it was saved there before, what has changed.

        The folder holds the state of before or this one, whenever the process ends. Many threads may search
        meanwhile; what writes waits. Chunks that have left the bank stay in the folder until half of those that were
        saved with them have left, too.

        Parameters
        ----------
        path : str or Path
            A folder, made if it does not exist. What another bank was saved there is replaced.
        compact : bool, default False
            Rewrite everything, the index as well, so that nothing of chunks that have left remains.

        Raises
        ------
        SnapshotError
            If it cannot be written; the folder then holds what it did.
        InvalidArgumentError
            If an option of the bank cannot be written.
        """
        with SnapshotWriter(folder_of(path), "bank") as writer:
            saved = self.write_snapshot(writer, compact=compact)
            writer.commit([saved.record])
            self.keep_saved(saved)

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

        Whose class the manifest names, `memlong.load_bank` finds out.

        Parameters
        ----------
        path : str or Path
            The folder.
        row : int, optional
            Which bank, where a decoder of several rows was saved.
        lazy : bool, default False
            Leave keys and values on disk, each to be read, and checked, when it is wanted.
        trust_index : bool, default False
            Take saved options beyond the bounds that hold for a stranger's, and read the index library's own file,
            where this class, with the same options, wrote one. These libraries read whatever they are given, and a file
            that was made to harm can: so say this of your own snapshots only. Otherwise the index is rebuilt from the
            embeddings.
        most_bytes : int or str, optional
            Refuse a snapshot whose files take more.
        kv_device : str, optional
            Where keys and values go, by default where they came from.
        **options
            Options of the bank that are to be others than those saved. The backend's own are those saved only if this
            class saved them. `store` is where keys and values live from now on.

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
                f"{cls.__name__} is no backend: memlong.load_bank(path) makes a bank of the one that was saved, "
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
        if lazy and options.get("store") is not None:
            raise InvalidArgumentError(
                "lazy leaves keys and values in the snapshot, but a store is given: use one of both"
            )
        if lazy:
            options["store"] = SnapshotStore()
        bank = cls._made_for(stored, options, trusted=trust_index)
        try:
            bank._check_room(stored)  # noqa: SLF001 - its own
            bank._restore(stored, trust_index=trust_index)  # noqa: SLF001 - its own
        except BaseException:
            bank._store.clear()  # noqa: SLF001 - its own; what was not proven is nobody's, and there may be another try
            raise
        return bank

    def __reduce_ex__(self, _: object) -> tuple[Any, ...]:
        """A copy holds the same chunks, usage, options and index, with keys and values in memory, in as many bits."""
        options = {**asdict(self._index.options), "eviction": self._capacity.policy}
        return unpacked, (self.maker, packed(self), options, self._store.storage_dtype)

    def write_snapshot(self, writer: SnapshotWriter, *, compact: bool = False) -> SavedBank:
        """Write what a state of a folder needs of this bank; `keep_saved` follows when the state is current."""
        if compact:
            with self._lock.write():
                self._drop_index()  # which may remember embeddings of chunks that have left
        with self._reading(searching=True):
            layout = self._contents.layout
            content = self._content()
            chunk_bytes = 0 if layout is None else layout.nbytes
            known = () if compact else self._known_to(writer)
            kept = keepable(known, content.ids, chunk_bytes)
            on_disk = np.concatenate([np.empty(0, dtype=np.int64), *(each.ids for each in kept)])
            fresh = content.rows(~np.isin(content.ids, on_disk))
            written = [] if layout is None else write_segments(writer, fresh, self._store, layout)
            record = self._record(writer, content, layout, [*kept, *written])
        return SavedBank(writer.token, record, (*kept, *written))

    def keep_saved(self, saved: SavedBank) -> None:
        """Note down what is on disk now, so that the next save writes only what has changed."""
        self._saved = saved

    def _record(
        self,
        writer: SnapshotWriter,
        content: Content,
        layout: ChunkLayout | None,
        segments: list[Segment],
    ) -> BankRecord:
        state = {name: getattr(content, name) for name in ("ids", "retrievals", "last_used")}
        try:
            native = self._index.dump()
        except OSError as error:  # libraries write files of their own, elsewhere
            raise unwritable(writer.folder, error) from error
        return BankRecord(
            made_by=_name(self.maker),
            options=self.options_to_save(),
            dim=self._dim,
            metric=self._metric,
            max_chunks=self._capacity.max_chunks,
            max_bytes=self._capacity.max_bytes,
            eviction=saved_name(self._capacity.policy),
            device=str(self._device),
            count=len(content.ids),
            next_id=self._contents.next_id,
            clock=self._table.clock,
            layout=layout_record(layout),
            origin=self.origin,
            state=writer.write("state", encode(state)),
            segments=tuple(each.record for each in segments),
            index=None if native is None else IndexRecord(native[0], writer.write("index", native[1], "bin")),
        )

    def _content(self) -> Content:
        with self._counting:
            usage = self._table.usage
            retrievals, last_used = usage.retrievals.copy(), usage.last_used.copy()
        return Content(usage.ids.copy(), self._table.embeddings, self._table.spans, retrievals, last_used)

    def _known_to(self, writer: SnapshotWriter) -> tuple[Segment, ...]:
        """Segments that the folder's current state has of this very bank."""
        before = self._saved
        if before is None or writer.current is None or writer.current.token != before.token:
            return ()
        for file in (file for each in before.segments for file in (each.record.chunks, each.record.blocks)):
            try:
                if (writer.folder / file.name).lstat().st_size != file.nbytes:
                    return ()
            except OSError:
                return ()
        return before.segments

    @classmethod
    def _made_for(cls, stored: StoredBank, given: dict[str, Any], *, trusted: bool) -> Self:
        record = stored.record
        if given.get("metric", record.metric) != record.metric:
            raise InvalidArgumentError(
                f"metric is {given['metric']!r}, but the bank was saved with {record.metric!r}, for which its "
                "embeddings were made: leave metric out"
            )
        if record.eviction is None and "eviction" not in given:
            raise InvalidArgumentError(
                "the bank was saved with an eviction policy of its owner's: give it, or another, as eviction"
            )
        options: dict[str, Any] = {
            name: getattr(record, name) for name in ("metric", "max_chunks", "max_bytes")
        }
        options["eviction"] = record.eviction
        if record.made_by == _name(cls.maker):
            odd = _OF_EVERY_BANK & record.options.keys()
            if odd:
                raise damaged(stored.manifest_path, f"has options of no backend's own: {', '.join(odd)}")
            own = {name: value for name, value in record.options.items() if name not in given}
            allowed = dict.fromkeys(cls.saved_options) if trusted else cls.saved_options
            if refused := refused_option(cls, own, allowed):
                raise SnapshotError(f"{str(stored.manifest_path)!r} {refused}")
            options |= {**own, "device": record.device}
        try:
            return cls(record.dim, **{**options, **given})
        except DeviceUnavailableError:
            raise
        except (
            InvalidArgumentError,
            TypeError,
            ValueError,
            OverflowError,
            MemoryError,
            RuntimeError,
        ) as error:
            cls._check_given(record.dim, given)
            raise SnapshotError(
                f"{str(stored.manifest_path)!r} names options that {cls.__name__} does not take ({error}). Give others "
                "when loading, or load into another backend."
            ) from error

    @classmethod
    def _check_given(cls, dim: int, given: dict[str, Any]) -> None:
        """Raise what is wrong with the options that the caller gave, whatever the snapshot says."""
        try:
            cls(dim, **given)
        except TypeError as error:
            raise InvalidArgumentError(
                f"{cls.__name__} does not take {', '.join(given)} ({error})"
            ) from error

    def _restore(self, stored: StoredBank, *, trust_index: bool) -> None:
        content, layout = stored.content, stored.layout
        room = None if layout is None else self._room_for(layout, stored)
        leaving = self._capacity.victims(content.usage, room)
        if len(leaving):
            content = content.rows(~np.isin(content.ids, leaving))
        with self._lock.write():
            self._table.fill(
                content.ids,
                content.embeddings,
                content.spans,
                content.retrievals,
                content.last_used,
                stored.record.clock,
            )
            self._contents.fill(layout, stored.record.next_id)
            self.origin = stored.record.origin
            self._drop_index()
            if isinstance(self._store, SnapshotStore):
                stored.attach_to(self._store, content.ids)
            elif layout is not None:
                for ids, states in stored.blocks(content.ids):
                    keys, values = states.to(layout.device).unbind(1)
                    self._store.take(ids, keys, values)
        made_by, options = stored.record.made_by, dict(stored.record.options)
        if trust_index and (made_by, options) == (
            _name(self.maker),
            self.options_to_save(),
        ):
            index = stored.index_file()
            if index is not None:
                self._use_index(stored, index)
        else:
            stored.check_index()
        self._saved = SavedBank(stored.token, stored.record, tuple(stored.on_disk))

    def _use_index(self, stored: StoredBank, content: bytes) -> None:
        record = stored.record.index
        assert record is not None  # noqa: S101 - there is a file
        with self._lock.write():
            if len(self._table) != stored.record.count:  # some were evicted at once
                return
            try:
                self._index.load(record.facts, content)
                self._index_is_current = True
            except (
                RuntimeError,
                ValueError,
                KeyError,
                TypeError,
                OverflowError,
                MemoryError,
                OSError,
            ) as error:
                raise SnapshotError(
                    f"{str(stored.folder / record.file.name)!r} is not read by this backend's library ({error}). Load "
                    "the snapshot without trust_index, which rebuilds the index."
                ) from error

    def _room_for(self, layout: ChunkLayout, stored: StoredBank) -> int | None:
        try:
            return self._capacity_for(layout)
        except InvalidArgumentError as error:
            if self._capacity.max_bytes != stored.record.max_bytes or self._store.max_bytes is not None:
                raise  # it was asked for now
            raise SnapshotError(
                f"{str(stored.manifest_path)!r} cannot be loaded within its own limit: {error}. If its store kept "
                "fewer bits, give such a store (store=TieredStore(host='2GB', dtype='int8')), or another max_bytes."
            ) from error

    def _check_room(self, stored: StoredBank) -> None:
        """Refuse to let chunks go that the bank held when it was saved, but for limits that are others now."""
        if stored.layout is None:
            return
        capacity, record, count = self._capacity, stored.record, len(stored.content.ids)
        room = self._room_for(stored.layout, stored)
        others = Capacity(
            None if capacity.max_chunks == record.max_chunks else capacity.max_chunks,
            None if capacity.max_bytes == record.max_bytes else capacity.max_bytes,
            capacity.policy,
        )
        asked = others.in_chunks(*self._chunk_bytes(stored.layout), self._store.max_bytes)
        wanted = count if asked is None else min(count, asked)
        if room is not None and room < wanted:
            raise SnapshotError(
                f"{str(stored.folder)!r} holds {count} chunks, but only {room} fit into its limits (max_chunks "
                f"{capacity.max_chunks}, max_bytes {capacity.max_bytes}): its store kept fewer bits. Give another "
                "max_bytes, or, without lazy, such a store (store=TieredStore(host='2GB', dtype='int8'))."
            )

    def _capacity_for(self, layout: ChunkLayout) -> int | None:
        return self._capacity.in_chunks(*self._chunk_bytes(layout), self._store.max_bytes)

    def _chunk_bytes(self, layout: ChunkLayout) -> tuple[int, int]:
        """Bytes of a chunk's embedding, and of its keys and values in the store."""
        return self._dim * np.dtype(np.float32).itemsize, self._store.record_bytes(layout)


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
