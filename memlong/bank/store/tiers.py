"""TieredStore: keys and values on the device, in host memory, on disk or as objects; recent ones are cached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from memlong.bank.forks import fork_lock
from memlong.bank.layout import ChunkLayout
from memlong.bank.sessions.folders import absolute
from memlong.bank.store.arguments import budget_of, check_store
from memlong.bank.store.block import BlockKind
from memlong.bank.store.codec import BlockCodec, StorageDtype, make_codec
from memlong.bank.store.disk import DiskSlots
from memlong.bank.store.folder import ObjectFolder
from memlong.bank.store.objects import objects_at
from memlong.bank.store.records import Records
from memlong.bank.store.slabs import Slabs
from memlong.bank.store.store import KeyValueStore
from memlong.bank.store.tier import DiskTier, MemoryTier, ObjectTier, PinnedTier, TensorTier, Tier
from memlong.errors import InvalidArgumentError, LostChunksError, StorageError

_HOST = torch.device("cpu")


class TieredStore(KeyValueStore):
    """Keys and values in up to three tiers: ``device``, ``host``, and one of ``disk`` and ``objects``.

    The farthest of the given tiers holds every block; its budget is the capacity of the store, which the bank enforces
    by eviction. The tiers nearer to the model hold copies of recently stored or retrieved blocks, up to their budgets.
    A block is written to disk, or as an object, when it is stored: an error is raised before anything has changed, and
    reading never writes, except that saving writes a lost object again if a nearer tier holds its block.

    If the model runs on the CPU, ``device`` and ``host`` are the same memory; give only one of them.

    Parameters
    ----------
    device : int or str, optional
        Budget in bytes (or text such as "500MB") on the blocks' device; "all" means no limit.
    host : int or str, optional
        Budget in host memory.
    disk : str or Path, optional
        Folder for a temporary file that is deleted with this object.
    disk_budget : int or str, optional
        Budget in that folder; by default, no limit.
    objects : str, Path or ObjectFolder, optional
        Place for objects, one per chunk: a folder, or a URI that fsspec knows, such as ``s3://bucket/folder``. Each
        store has its own folder there, deleted when the store is garbage-collected but not if the process is killed; an
        `ObjectFolder` may be permanent.
    readers : int, default 8
        Threads that read and write objects; an `ObjectFolder` brings its own number.
    dtype : "bfloat16", "float8" or "int8", optional
        Dtype to store numbers in, with scales if it has eight bits; by default, their own. Blocks come back in their
        own dtype, rounded.

    Raises
    ------
    InvalidArgumentError
        If no tier is given, or an argument is invalid.
    StorageError
        If the folder cannot be written to.
    MissingDependencyError
        If fsspec, or the package it needs for this place, is not installed.
    """

    def __init__(
        self,
        *,
        device: int | str | None = None,
        host: int | str | None = None,
        disk: str | Path | None = None,
        disk_budget: int | str | None = None,
        objects: str | Path | ObjectFolder | None = None,
        readers: int = 8,
        dtype: StorageDtype | None = None,
    ) -> None:
        check_store(
            device=device,
            host=host,
            disk=disk,
            disk_budget=disk_budget,
            objects=objects,
            readers=readers,
            dtype=dtype,
        )
        self._folder = _folder(objects, int(readers))
        if self._folder is not None:
            self._folder.claim(self)
        self._device = budget_of("device", device)
        self._host = budget_of("host", host)
        self._disk = None if disk is None else absolute(disk)
        self._disk_budget = budget_of("disk_budget", disk_budget)
        self._has_device, self._has_host = device is not None, host is not None
        self._dtype = dtype
        if self._disk is not None:
            DiskSlots(self._disk, 1).close()  # raise early if the folder is not writable
        self._codec: BlockCodec | None = None
        self._near: list[MemoryTier[Any]] = []
        self._slabs: Slabs | None = None
        self._whole: Tier | None = None
        self._ids: set[int] = set()
        self._lock = fork_lock()

    @property
    def storage_dtype(self) -> StorageDtype | None:
        """The dtype that blocks are stored in; None means their own."""
        return self._dtype

    def record_bytes(self, layout: ChunkLayout) -> int:
        """Return the stored size of a block of this layout, in bytes."""
        return make_codec(layout, self._dtype).nbytes

    def check_layout(self, layout: ChunkLayout) -> None:
        """Raise InvalidArgumentError if a tier's budget is smaller than one block of this layout."""
        needed = self.record_bytes(layout)
        budgets = {"device": self._device, "host": self._host, "disk_budget": self._disk_budget}
        for name, budget in budgets.items():
            if budget is not None and budget < needed:
                raise InvalidArgumentError(
                    f"{name} must be at least {needed} bytes, the keys and values of one chunk, got {budget}: raise "
                    "it, or leave it out"
                )

    def check_device(self, device: torch.device) -> None:
        """Raise InvalidArgumentError if blocks from this device cannot be kept in the given tiers."""
        if device.type == "cpu" and self._has_device and self._has_host:
            raise InvalidArgumentError(
                "device and host cannot be combined on the CPU, where they are the same memory: give one of them"
            )

    @property
    def max_bytes(self) -> int | None:
        """Budget of the farthest tier, which holds everything; None means no limit."""
        if self._disk is not None or self._folder is not None:
            return self._disk_budget
        return self._host if self._has_host else self._device

    def put(self, ids: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store blocks in the farthest tier, with copies in the nearer ones."""
        with self._lock:
            held = [chunk_id for chunk_id in ids if chunk_id in self._ids]
            if held or len(set(ids)) < len(ids):
                raise InvalidArgumentError(f"the store already holds ids {held or ids}; ids are never reused")
            codec, whole = self._opened(ChunkLayout.of(keys))
            encoded = codec.encode(keys, values)
            records = Records(list(encoded), apart=len(ids) == 1, slabs=self._slabs)
            self._drop(ids)  # left over from a call that was interrupted twice
            try:
                whole.put(ids, records)
                self._keep_near(ids, records)
                self._ids.update(ids)
            except BaseException:
                self._ids.difference_update(ids)
                self._drop(ids)
                raise

    def get(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Fetch blocks from the nearest tiers that hold them, and keep copies in nearer ones."""
        with self._lock:
            codec, whole = self._holding(ids)
            parts: list[tuple[Tier, list[int], Records]] = []
            far = list(dict.fromkeys(ids))
            for tier in self._near:
                here = [chunk_id for chunk_id in far if chunk_id in tier]
                parts.append((tier, here, tier.get(here)))
                far = [chunk_id for chunk_id in far if chunk_id not in tier]
            if far and not self._reads_alone:
                parts.append((whole, far, whole.get(far)))
                far = []
        if far:
            parts.append((whole, far, whole.get(far)))
        with self._lock:
            found: dict[int, torch.Tensor] = {}
            for _, there, records in parts:
                found.update(zip(there, records.at(codec.layout.device), strict=True))
            for source, there, records in parts:
                if source not in self._near[:1] and self._ids.issuperset(there):
                    self._keep_near(there, records)
        return codec.decode([found[chunk_id] for chunk_id in ids])

    def peek(self, ids: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Read from the farthest tier, which holds everything, so that the nearer ones keep what searches use."""
        together = 1 if self._folder is None else self._folder.readers
        lost: dict[int, str] = {}
        for start in range(0, len(ids), together):
            some = list(ids[start : start + together])
            copies: dict[int, torch.Tensor] = {}
            while True:
                there = [chunk_id for chunk_id in some if chunk_id not in copies]
                try:
                    with nullcontext() if self._reads_alone else self._lock:
                        codec, whole = self._holding(some)
                        records = whole.get(there)
                        found = records.at(codec.layout.device if self._slabs is None else _HOST)
                    break
                except LostChunksError as error:
                    rescued = self._rescued(error.reasons)
                    gone = {each: why for each, why in error.reasons.items() if each not in rescued}
                    copies |= rescued
                    lost |= gone
                    some = [chunk_id for chunk_id in some if chunk_id not in gone]
            if lost:  # read on, to name all of them before any caller begins again
                continue
            # `records` keeps a slot from being written over meanwhile
            copies |= dict(zip(there, found, strict=True))
            for chunk_id in some:
                keys, values = codec.decode([copies[chunk_id]])
                yield keys[0], values[0]
        if lost:
            raise LostChunksError(lost)

    def remove(self, ids: Sequence[int]) -> None:
        """Remove blocks from all tiers."""
        with self._lock:
            self._holding(ids)
            try:
                self._ids.difference_update(ids)
                self._drop(ids)
            except StorageError:
                self._ids.update(ids)
                raise
            except BaseException:
                self._ids.difference_update(ids)
                self._drop(ids)
                raise

    def clear(self) -> None:
        """Remove all blocks, with the disk tier's file and the objects, and forget the layout."""
        with self._lock:
            if self._folder is not None:
                self._folder.require_owner()
            held = list(self._ids)
            self._ids.clear()  # first: the next `put` then creates new tiers
            if self._folder is not None:
                self._folder.delete(held)
                self._folder.forget_notes()
            self._codec = self._whole = self._slabs = None
            self._near = []

    def adopt(self, ids: Sequence[int], device: torch.device) -> ChunkLayout | None:
        """Take over the existing blocks of an `ObjectFolder`.

        Parameters
        ----------
        ids : sequence of int
            Ids of the blocks; the store must be empty.
        device : torch.device
            Device that the blocks are returned on.

        Returns
        -------
        ChunkLayout or None
            Layout of the blocks; None if none can be read, and then nothing is taken over.
        """
        kind = None if self._folder is None else self._folder.kind(ids)
        if kind is None:
            return None
        if kind.stored != self._dtype:
            raise InvalidArgumentError(
                f"dtype must be that of the objects, {kind.stored!r}, got {self._dtype!r}: give dtype={kind.stored!r}"
            )
        layout = ChunkLayout(kind.shape, kind.dtype, device)
        with self._lock:
            _, whole = self._opened(layout)
            if isinstance(whole, ObjectTier):
                whole.adopt(ids)
            self._ids.update(ids)
        return layout

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, chunk_id: object) -> bool:
        return chunk_id in self._ids

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks held, without copies in nearer tiers."""
        return 0 if self._codec is None else len(self._ids) * self._codec.nbytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of the blocks on the device and in host memory, copies included."""
        in_memory = [tier for tier in (self._whole, *self._near) if isinstance(tier, MemoryTier)]
        return 0 if self._codec is None else sum(map(len, in_memory)) * self._codec.nbytes

    @property
    def open_files(self) -> int:
        """Number of files kept open: one if a disk tier holds, or has held, anything."""
        return int(self._disk is not None and self._whole is not None)

    @property
    def _reads_alone(self) -> bool:
        """Whether the farthest tier is read without the lock, as a slow network would block other threads."""
        return self._folder is not None and self._slabs is None

    def _opened(self, layout: ChunkLayout) -> tuple[BlockCodec, Tier]:
        """Create the tiers for this layout, unless there are blocks already."""
        if self._ids and self._codec is not None and self._whole is not None:
            self._codec.layout.require_same(layout)
            return self._codec, self._whole
        self.check_device(layout.device)
        codec = make_codec(layout, self._dtype)
        on_host = self._has_host or self._disk is not None or self._folder is not None
        slabs = _slabs_for(layout, codec, self._host) if on_host else None
        tiers: list[Tier] = []
        if self._has_device:
            tiers.append(TensorTier(self._device, layout.device, slabs))
        if self._has_host:
            host = TensorTier(self._host, _HOST) if slabs is None else PinnedTier(self._host, slabs)
            tiers.append(host)
        if self._disk is not None:
            tiers.append(DiskTier(self._disk_budget, self._disk, codec.nbytes, slabs))
        if self._folder is not None:
            kind = BlockKind.of(layout, self._dtype)
            tiers.append(ObjectTier(self._folder, kind, codec.nbytes, slabs))
        *near, self._whole = tiers
        self._near = [tier for tier in near if isinstance(tier, MemoryTier)]
        self._slabs = slabs
        self._codec = codec
        return codec, self._whole

    def _holding(self, ids: Sequence[int]) -> tuple[BlockCodec, Tier]:
        unknown = [chunk_id for chunk_id in ids if chunk_id not in self._ids]
        if unknown or self._codec is None or self._whole is None:
            raise InvalidArgumentError(f"the store holds no block for ids {unknown}")
        return self._codec, self._whole

    def _rescued(self, ids: Iterable[int]) -> dict[int, torch.Tensor]:
        """Return the records of lost blocks that a nearer tier holds, and write them again if the place allows it."""
        found: dict[int, torch.Tensor] = {}
        with self._lock:
            codec, whole = self._holding([])
            for tier in self._near:
                here = [each for each in ids if each in tier and each in self._ids and each not in found]
                if not here:
                    continue
                records = tier.get(here)
                with suppress(StorageError):
                    whole.put(here, records)
                device = codec.layout.device if self._slabs is None else _HOST
                found |= {each: record.clone() for each, record in zip(here, records.at(device), strict=True)}
        return found

    def _drop(self, ids: Sequence[int]) -> None:
        for tier in (self._whole, *self._near):  # the farthest first: only it can fail
            if tier is not None:
                tier.remove(ids)

    def _keep_near(self, ids: Sequence[int], records: Records) -> None:
        assert self._codec is not None  # noqa: S101 - there are records
        for tier in self._near:
            tier.put(ids, records)
            tier.trim(self._codec.nbytes)


def _slabs_for(layout: ChunkLayout, codec: BlockCodec, budget: int | None) -> Slabs | None:
    """Return page-locked memory for records if a CUDA device copies them; None if the host does."""
    return Slabs(codec.nbytes, layout.device, budget) if layout.device.type == "cuda" else None


def _folder(objects: str | Path | ObjectFolder | None, readers: int) -> ObjectFolder | None:
    if objects is None or isinstance(objects, ObjectFolder):
        return objects
    return ObjectFolder(objects_at(objects, synced=False), readers=readers)
