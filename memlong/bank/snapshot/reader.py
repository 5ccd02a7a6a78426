"""StoredBank: a bank in a snapshot, read and checked without its backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch

from memlong.bank.arrays import Ids
from memlong.bank.layout import ChunkLayout
from memlong.bank.sessions.folders import at_home, not_a_uri
from memlong.bank.sizes import byte_count
from memlong.bank.snapshot.content import Content, check_state
from memlong.bank.snapshot.files import check_file, damaged, followed, is_hollow, read_checked
from memlong.bank.snapshot.lazy import BlocksFile, SnapshotStore
from memlong.bank.snapshot.manifest import (
    MANIFEST,
    BankRecord,
    BaseRecord,
    LayoutRecord,
    Manifest,
    has_manifest,
    is_state,
    read_manifest,
)
from memlong.bank.snapshot.segments import SegmentChunks, StoredSegment, read_blocks, read_chunks
from memlong.bank.snapshot.tensors import DTYPES, dtype_name, read_arrays
from memlong.bank.validate import whole_number
from memlong.errors import DeviceUnavailableError, InvalidArgumentError, SnapshotError

Result = TypeVar("Result")

_TRIES = 5


def folder_of(path: str | Path) -> Path:
    """Return the folder that a user named."""
    if not isinstance(path, str | Path) or not str(path) or "\0" in str(path):
        raise InvalidArgumentError(f"path must be the path of a folder, got {path!r:.80}")
    not_a_uri(path)
    return at_home(path)


def open_snapshot(folder: Path, action: Callable[[Manifest], Result], most_bytes: int | str | None) -> Result:
    """Call a function on a snapshot's manifest; retry if another state was written to the folder in the meantime.

    Raises
    ------
    SnapshotError
        If the folder holds no snapshot, or one of more than ``most_bytes``, or the action raises it.
    """
    for _ in range(_TRIES):
        manifest = _manifest(folder)
        _check_size(folder, manifest, most_bytes)
        try:
            return action(manifest)
        except SnapshotError:
            if is_state(folder, manifest.token):
                raise
    raise SnapshotError(
        f"{str(folder)!r} was rewritten {_TRIES} times while it was read. Load it when nothing is writing there"
    )


class Base(Protocol):
    """What a snapshot knows of a bank that it lay over."""

    @property
    def identity(self) -> str:
        """Which bank it is."""

    def fingerprint(self) -> str:
        """Return the SHA-256 of its content."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class StoredBank:
    """One bank of a snapshot: its table, read and checked; keys and values have not been read.

    Attributes
    ----------
    folder : Path
        Folder of the snapshot.
    record : BankRecord
        What the manifest says of the bank.
    token : str
        Token of the folder's state.
    content : Content
        The rows of its table.
    layout : ChunkLayout or None
        Layout of its blocks.
    segments : tuple of SegmentChunks
        Ids, spans, embeddings and checksums of each of the record's segments.
    among : tuple
        For each of the record's bases the ids, ascending, of the chunks that could be found there; None for all.
    """

    folder: Path
    record: BankRecord
    token: str
    content: Content
    layout: ChunkLayout | None
    segments: tuple[SegmentChunks, ...]
    among: tuple[Ids | None, ...] = ()

    @property
    def manifest_path(self) -> Path:
        """For messages."""
        return self.folder / MANIFEST

    @property
    def on_disk(self) -> list[StoredSegment]:
        """The segments, for the next save."""
        pairs = zip(self.record.segments, self.segments, strict=True)
        return [StoredSegment(record, chunks.ids) for record, chunks in pairs]

    def blocks(self, ids: Ids) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Read and prove all keys and values, [n, 2, *layout.shape] at a time, and yield those of some ids.

        They must not be used before the iterator has ended.
        """
        for record, chunks in zip(self.record.segments, self.segments, strict=True):
            assert self.layout is not None  # noqa: S101 - `read_bank` has seen to that
            for found, states in read_blocks(self.folder, record, chunks, self.layout):
                wanted = np.isin(found, ids)
                chosen = states if wanted.all() else states[torch.from_numpy(wanted)]
                if len(chosen):
                    yield found[wanted].tolist(), chosen

    def attach_to(self, store: SnapshotStore, ids: Ids) -> None:
        """Have a store read keys and values of some ids on demand."""
        for record, chunks in zip(self.record.segments, self.segments, strict=True):
            assert self.layout is not None  # noqa: S101 - `read_bank` has seen to that
            store.attach(BlocksFile(self.folder, record, chunks, self.layout), ids.tolist())

    def apart_from(self, bases: Sequence[Base], *, any_bases: bool) -> StoredBank:
        """Return the same as a bank of its own, to be put over these bases, `among` which it may find what it could.

        Raises
        ------
        SnapshotError
            Unless ``any_bases``, if they are not the ones that it was saved over, whatever these hold by now.
        """
        before = self.record.bases
        if not any_bases and before:
            if len(bases) != len(before):
                raise SnapshotError(
                    f"{str(self.folder)!r} was saved over {len(before)} bases, got {len(bases)}: pass those as bases, "
                    "in their order, or any_bases=True to continue over others, or none"
                )
            for number, (base, known) in enumerate(zip(bases, before, strict=True)):
                if not is_same_base(base, known):
                    raise SnapshotError(
                        f"{str(self.folder)!r} was saved over another base {number}, of {known.chunks:,} chunks, got "
                        f"one of {len(base):,}: pass that one, or any_bases=True to continue over what it holds now"
                    )
        among = [
            self.among[number] if number < len(before) and is_same_base(base, before[number]) else None
            for number, base in enumerate(bases)
        ]
        return replace(self, record=replace(self.record, bases=()), among=tuple(among))

    def is_over(self, bases: Sequence[Base]) -> bool:
        """Whether these are the bases that it was saved over, and hold what they held then."""
        told = [each.fingerprint for each in self.record.bases]
        return told == [base.fingerprint() for base in bases]

    def index_file(self) -> bytes | None:
        """Return the native index's file, proven to be what was saved; None if there is none."""
        return None if self.record.index is None else read_checked(self.folder, self.record.index.file)

    def check_index(self) -> None:
        """Raise SnapshotError unless the native index's file, if there is one, is what was saved."""
        if self.record.index is not None:
            check_file(self.folder, self.record.index.file)


def read_bank(folder: Path, manifest: Manifest, row: int | None, kv_device: str | None = None) -> StoredBank:
    """Read and check the table of a bank.

    Parameters
    ----------
    folder, manifest
        The snapshot.
    row : int, optional
        Which bank, if there are several.
    kv_device : str, optional
        Where keys and values go, by default where they came from.

    Raises
    ------
    InvalidArgumentError
        If there is no such row.
    SnapshotError
        If something is not what was saved, or impossible.
    """
    record = _chosen(folder, manifest, row)
    path = folder / MANIFEST
    count = record.count
    state = read_arrays(
        folder,
        record.state,
        {
            **dict.fromkeys(("ids", "retrievals", "last_used"), ("int64", (count,))),
            **{
                f"among.{number}": ("int64", (base.among,))
                for number, base in enumerate(record.bases)
                if base.among is not None
            },
        },
    )
    among = tuple(state.pop(f"among.{number}", None) for number in range(len(record.bases)))
    check_state(folder / record.state.name, **state, next_id=record.next_id, clock=record.clock)
    for each in among:
        if each is not None and len(each) and (each[0] < 0 or (np.diff(each) <= 0).any()):
            raise damaged(folder / record.state.name, "holds ids of a base that do not ascend from 0")
    layout = None if record.layout is None else _layout(path, record.layout, kv_device)
    if layout is None and record.segments:
        raise damaged(path, "has chunks, but does not say of what kind")
    segments = tuple(read_chunks(folder, record, each) for each in record.segments)
    ids = np.concatenate([np.empty(0, dtype=np.int64), *(each.ids for each in segments)])
    order = np.argsort(ids, kind="stable")
    if (np.diff(ids[order]) == 0).any():
        raise damaged(path, "names segments that hold a chunk twice")
    places = np.searchsorted(ids[order], state["ids"])
    if len(state["ids"]) and (places[-1] >= len(ids) or (ids[order][places] != state["ids"]).any()):
        raise damaged(folder / record.state.name, "names chunks that are in no segment")
    held = order[places]
    embeddings = np.concatenate(
        [np.empty((0, record.dim), dtype=np.float32), *(each.embeddings for each in segments)]
    )
    spans = np.concatenate([np.empty((0, 2), dtype=np.int64), *(each.spans for each in segments)])
    content = Content(state["ids"], embeddings[held], spans[held], state["retrievals"], state["last_used"])
    return StoredBank(folder, record, manifest.token, content, layout, segments, among)


def is_same_base(base: Base, known: BaseRecord) -> bool:
    """Whether a bank is the one that a snapshot lay over, or holds what that did."""
    return known.identity == base.identity or known.fingerprint == base.fingerprint()


def _manifest(folder: Path) -> Manifest:
    if folder.is_file():
        raise SnapshotError(f"{str(folder)!r} is a file. Name the folder that was saved to")
    if not has_manifest(folder):
        raise SnapshotError(
            f"{str(folder)!r} holds no {MANIFEST}, so no snapshot. Name the folder that was saved to"
        )
    return read_manifest(folder)


def _check_size(folder: Path, manifest: Manifest, most_bytes: int | str | None) -> None:
    if most_bytes is None:
        paths = [followed(folder / file.name) for file in manifest.files]
        if is_hollow(*paths):
            hollow = next((f"{path.name!r} in " for path in paths if is_hollow(path)), "")
            raise SnapshotError(
                f"{hollow}{str(folder)!r} claims far more bytes than there are on the disk. If you trust the snapshot, "
                "say as most_bytes how much may be read"
            )
        return
    limit = byte_count("most_bytes", most_bytes)
    total = sum(file.nbytes for file in manifest.files)
    if total > limit:
        raise SnapshotError(
            f"{str(folder / MANIFEST)!r} names files of {total:,} bytes, more than most_bytes, {limit:,}. Raise it if "
            "you trust the snapshot"
        )


def _chosen(folder: Path, manifest: Manifest, row: int | None) -> BankRecord:
    banks = manifest.banks
    if row is None and len(banks) != 1:
        raise InvalidArgumentError(f"{str(folder)!r} holds {len(banks)} banks: say which with row, from 0")
    number = whole_number("row", 0 if row is None else row, at_least=0)
    if number >= len(banks):
        raise InvalidArgumentError(f"row is {row!r}, but {str(folder)!r} holds {len(banks)} banks, from 0")
    return banks[number]


def _layout(path: Path, record: LayoutRecord, kv_device: str | None) -> ChunkLayout:
    if record.dtype not in DTYPES:
        raise damaged(path, f"has keys and values of dtype {record.dtype!r}, expected {' or '.join(DTYPES)}")
    try:
        device = torch.device(record.device if kv_device is None else kv_device)
    except (RuntimeError, TypeError) as error:
        if kv_device is not None:
            raise InvalidArgumentError(f"kv_device must be a torch device, got {kv_device!r}") from error
        raise damaged(path, f"has keys and values on {record.device!r}, which is not a device") from error
    if device.type == "meta" or (kv_device is None and device.type not in ("cpu", "cuda")):
        raise DeviceUnavailableError(
            f"a snapshot may not choose {device} for keys and values: choose with kv_device, as in kv_device='cpu'"
        )
    if device.type == "cpu":
        device = torch.device("cpu")  # "cpu:5" is the same
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailableError(
            f"keys and values go to {device}, but torch sees {torch.cuda.device_count()} CUDA devices here: load them "
            "with kv_device='cpu'"
        )
    return ChunkLayout(record.shape, getattr(torch, record.dtype), device)


def layout_record(layout: ChunkLayout | None) -> LayoutRecord | None:
    """Return what a manifest says of a layout."""
    if layout is None:
        return None
    return LayoutRecord(tuple(layout.shape), dtype_name(layout.dtype), str(layout.device))


def on_cpu(layout: ChunkLayout) -> ChunkLayout:
    """Return the layout of the same blocks on the CPU."""
    return replace(layout, device=torch.device("cpu"))
