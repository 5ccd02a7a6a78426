"""Streams and their banks as a folder: written, checked, and continued from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from memlong.bank import MemoryBank
from memlong.bank.snapshot.files import damaged
from memlong.bank.snapshot.manifest import ExtraRecord, Manifest
from memlong.bank.snapshot.reader import StoredBank, folder_of, open_snapshot, read_bank
from memlong.bank.snapshot.saving import write_bank
from memlong.bank.snapshot.segments import check_finite
from memlong.bank.snapshot.tensors import read_streams
from memlong.bank.snapshot.writer import SnapshotWriter
from memlong.decoder.model.machine import DTYPES, loading_in
from memlong.decoder.persistence.fingerprint import differences, fingerprint
from memlong.decoder.setup import Setup
from memlong.decoder.stream.banks import check_banks
from memlong.decoder.stream.batch import StreamBatch
from memlong.decoder.stream.current import CurrentStreams
from memlong.errors import InvalidArgumentError, MemlongError, SnapshotError


@dataclass(frozen=True)
class Reading:
    """How a snapshot is read: the arguments of `MemoryDecoder.restore` of the same names."""

    lazy: bool = False
    trust_index: bool = False
    any_model: bool = False
    most_bytes: int | str | None = None
    bases: Sequence[MemoryBank] = ()
    any_bases: bool = False


def write_snapshot(path: str | Path, setup: Setup, streams: CurrentStreams, *, compact: bool) -> None:
    """Write the current streams and their banks into a folder.

    Raises
    ------
    SnapshotError
        If they cannot be written.
    MemlongError
        If nothing has been read yet.
    """
    batch = streams.batch
    if batch is None:
        raise MemlongError(
            "There is nothing to save: no text has been read since the decoder was made or reset"
        )
    facts, tensors = [stream.facts() for stream in batch.streams], batch.tensors()
    write_rows(path, setup, facts, tensors, streams.banks, compact=compact)


def write_rows(
    path: str | Path,
    setup: Setup,
    rows: Sequence[Mapping[str, Any]],
    tensors: Mapping[str, Tensor],
    banks: Sequence[MemoryBank],
    *,
    compact: bool = False,
) -> None:
    """Write what `StreamBatch.restore` takes, the facts of ``rows`` and ``tensors``, and their banks into a folder.

    Raises
    ------
    SnapshotError
        If they cannot be written.
    """
    with SnapshotWriter(folder_of(path), "decoder") as writer:
        facts = {"fingerprint": fingerprint(setup), "rows": list(rows)}
        own = {name: _own(tensor) for name, tensor in tensors.items()}
        saved = [write_bank(bank, writer, compact=compact) for bank in banks]
        file = writer.write("streams", safetensors.torch.save(own))
        writer.commit([each.record for each in saved], ExtraRecord(facts, file))
        for bank, each in zip(banks, saved, strict=True):
            bank.top.state.saved = each


def read_snapshot(path: str | Path, setup: Setup, streams: CurrentStreams, reading: Reading) -> StreamBatch:
    """Return saved streams, over their banks, for ``streams`` to continue with.

    Raises
    ------
    SnapshotError
        If the folder holds no streams, or damaged ones, or those of another model.
    """
    folder = folder_of(path)

    def restored(manifest: Manifest) -> StreamBatch:
        if manifest.kind != "decoder" or manifest.extra is None:
            raise SnapshotError(
                f"{str(folder)!r} holds a {manifest.kind}, and no streams of a decoder: load it with "
                "memlong.load_bank, and pass it to reset(banks=[...])"
            )
        _check_fingerprint(folder, manifest.extra, setup, any_model=reading.any_model)
        return _restored(folder, manifest, manifest.extra, setup, streams, reading)

    return open_snapshot(folder, restored, reading.most_bytes)


def _restored(
    folder: Path,
    manifest: Manifest,
    extra: ExtraRecord,
    setup: Setup,
    streams: CurrentStreams,
    reading: Reading,
) -> StreamBatch:
    path = folder / extra.file.name
    try:
        tensors = read_streams(folder, extra.file)
        rows = list(extra.facts["rows"])
        if len(rows) > sum(name.endswith(".recent") for name in tensors):
            raise ValueError(f"{len(rows):,} rows are named, and not all are there")
        if setup.config.backend is not None and len(rows) != len(manifest.banks):
            raise damaged(path, f"is of {len(rows)} rows, but there are {len(manifest.banks)} banks")
        for states in tensors.values():
            check_finite(path, states)
        stored = [] if setup.config.backend is None else _stored(folder, manifest, len(rows), setup)
        banks = [_bank_of(each, setup, reading) for each in stored]
        _check_fit(path, banks, setup)
        batch = streams.over(banks if stored else [None] * len(rows))
        changed = any(not each.is_over(reading.bases) for each in stored)
        batch.restore(rows, tensors, bases_changed=changed)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, MemlongError):
            raise
        if reading.any_model:
            raise SnapshotError(
                f"{str(path)!r} holds no streams that this decoder can continue ({error}). They were saved with a "
                "model of other shapes or other sizes, or are damaged: any_model=True does not change that"
            ) from error
        raise damaged(path, f"holds no streams of this decoder ({error!r})") from error
    return batch


def _check_fit(path: Path, banks: list[MemoryBank], setup: Setup) -> None:
    try:
        if banks:
            check_banks(banks, setup, any_model=True)  # the fingerprint covers more than their origin
    except InvalidArgumentError as error:
        raise SnapshotError(
            f"{str(path)!r} comes with banks that this decoder cannot use: {error}"
        ) from error


def _stored(folder: Path, manifest: Manifest, rows: int, setup: Setup) -> list[StoredBank]:
    return [read_bank(folder, manifest, row, str(setup.model.device)) for row in range(rows)]


def _bank_of(stored: StoredBank, setup: Setup, reading: Reading) -> MemoryBank:
    return setup.registry.bank_of(
        stored,
        setup.config.backend,
        bases=reading.bases,
        any_bases=reading.any_bases,
        lazy=reading.lazy,
        trust_index=reading.trust_index,
        **setup.bank_options,
    )


def _check_fingerprint(folder: Path, extra: ExtraRecord, setup: Setup, *, any_model: bool) -> None:
    theirs = extra.facts.get("fingerprint")
    if not isinstance(theirs, dict):
        raise damaged(folder / extra.file.name, "comes without the fingerprint of its model")
    if any_model:
        return
    ours = fingerprint(setup)
    odd = differences(ours, theirs)
    if odd:
        is_dtype = ours["dtype"] != theirs.get("dtype") and theirs.get("dtype") in list(DTYPES)
        raise SnapshotError(
            f"{str(folder)!r} was saved with another model or other settings, for which its keys and values were "
            f"made; what differs: {', '.join(odd)}. Use those, or any_model=True if you know that they fit"
            + (f". To {loading_in(theirs['dtype'])}" if is_dtype else "")
        )


def _own(tensor: Tensor) -> Tensor:
    """Copy: a file cannot hold two tensors that share memory, as raw keys and keys without positions do."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
