"""Maintain a snapshot without its backend: describe it, verify it, remove chunks that have left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from memlong.bank.snapshot.files import check_file, damaged
from memlong.bank.snapshot.lazy import SnapshotStore
from memlong.bank.snapshot.manifest import BankRecord, CorpusRecord, ExtraRecord, Manifest
from memlong.bank.snapshot.matrix import map_matrix, write_matrix
from memlong.bank.snapshot.reader import StoredBank, folder_of, open_snapshot, read_bank
from memlong.bank.snapshot.segments import check_finite, read_blocks, write_segments
from memlong.bank.snapshot.tensors import read_streams
from memlong.bank.snapshot.writer import SnapshotWriter


def describe(path: str | Path) -> dict[str, Any]:
    """Return what a folder's manifest says, ready for JSON; reads nothing else.

    Raises
    ------
    SnapshotError
        If there is no snapshot, or its manifest is damaged.
    """
    return open_snapshot(folder_of(path), _description, None)


def verify(
    path: str | Path,
    progress: Callable[[int], object] = lambda _: None,
    check_documents: Callable[[StoredBank, CorpusRecord], object] = lambda *_: None,
) -> dict[str, Any]:
    """Read every file of a folder, check everything that can be checked, and describe it.

    Parameters
    ----------
    path : str or Path
        The folder.
    progress : callable
        Called with the number of bytes read since the last call.
    check_documents : callable
        Called with the bank of a corpus and what its manifest says of its documents, to check those; what is in their
        files is known to `memlong.corpus` alone.

    Raises
    ------
    SnapshotError
        Naming the first file that is not what was saved.
    """
    folder = folder_of(path)

    def verified(manifest: Manifest) -> dict[str, Any]:
        for row in range(len(manifest.banks)):
            stored = read_bank(folder, manifest, row, "cpu")
            _verify_bank(stored, progress)
            if manifest.corpus is not None:
                _verify_documents(stored, manifest.corpus, progress)
                check_documents(stored, manifest.corpus)
        if manifest.extra is not None:
            _verify_extra(folder, manifest.extra)
            progress(manifest.extra.file.nbytes)
        return _description(manifest)

    return open_snapshot(folder, verified, None)


def compact(path: str | Path) -> dict[str, Any]:
    """Rewrite the chunks that are held, so that nothing of others remains, and describe the result.

    If any chunk has left the bank, the index file goes, too, since the library may keep its embedding. What a decoder's
    streams have retrieved stays.

    Raises
    ------
    SnapshotError
        If there is no snapshot, it is damaged, or it cannot be written; it is as it was then.
    """
    folder = folder_of(path)
    kind = open_snapshot(folder, lambda manifest: manifest.kind, None)
    with SnapshotWriter(folder, kind) as writer:
        manifest = writer.current
        if manifest is None:
            raise damaged(folder, "lost its manifest meanwhile")
        banks = [
            _compacted(writer, read_bank(folder, manifest, row, "cpu")) for row in range(len(manifest.banks))
        ]
        return _description(writer.commit(banks, manifest.extra, manifest.corpus))


def _description(manifest: Manifest) -> dict[str, Any]:
    fingerprint = None if manifest.extra is None else manifest.extra.facts.get("fingerprint")
    return {
        "kind": manifest.kind,
        "generation": manifest.generation,
        "bytes": sum(file.nbytes for file in manifest.files),
        "files": len(manifest.files) + 1,
        "versions": dict(manifest.versions),
        "banks": [_bank(record) for record in manifest.banks],
        "fingerprint": fingerprint if isinstance(fingerprint, dict) else None,
        "corpus": _corpus(manifest.corpus),
    }


def _corpus(corpus: CorpusRecord | None) -> dict[str, Any] | None:
    """Describe the documents of a corpus; None for anything else."""
    if corpus is None:
        return None
    model, parts = corpus.notes.get("model"), corpus.documents
    return {
        "model": model if isinstance(model, str) else None,
        "documents": sum(each.count for each in parts),
        "tokens": sum(each.tokens for each in parts),
        "bytes": sum(each.file.nbytes for each in parts),
    }


def _bank(record: BankRecord) -> dict[str, Any]:
    layout = record.layout
    return {
        "made_by": record.made_by,
        "options": dict(record.options),
        "dim": record.dim,
        "metric": record.metric,
        "max_chunks": record.max_chunks,
        "max_bytes": record.max_bytes,
        "eviction": record.eviction,
        "chunks": record.count,
        "left_behind": sum(each.count for each in record.segments) - record.count,
        "next_id": record.next_id,
        "chunk_shape": None if layout is None else list(layout.shape),
        "chunk_dtype": None if layout is None else layout.dtype,
        "bytes": sum(file.nbytes for file in record.files),
        "segments": len(record.segments),
        "bases": [each.chunks for each in record.bases],
        "index_bytes": 0 if record.index is None else record.index.file.nbytes,
    }


def _verify_bank(stored: StoredBank, progress: Callable[[int], object]) -> None:
    progress(stored.record.state.nbytes)
    for segment, chunks in zip(stored.record.segments, stored.segments, strict=True):
        rest = segment.chunks.nbytes + segment.blocks.nbytes
        assert stored.layout is not None  # noqa: S101 - `read_bank` has seen to that
        for _, states in read_blocks(stored.folder, segment, chunks, stored.layout):
            rest -= states.nbytes
            progress(states.nbytes)
        progress(rest)
    if stored.layout is not None:
        store = SnapshotStore()
        stored.attach_to(store, stored.content.ids)
        for (
            chunk_id
        ) in stored.content.ids.tolist():  # against its own checksum, as a lazily loaded bank reads it
            store.get([chunk_id])
    if stored.record.index is not None:
        stored.check_index()
        progress(stored.record.index.file.nbytes)
    if stored.record.matrix is not None:
        check_file(stored.folder, stored.record.matrix)
        map_matrix(stored.folder, stored.record.matrix, stored.content.embeddings)
        progress(stored.record.matrix.nbytes)


def _verify_documents(stored: StoredBank, corpus: CorpusRecord, progress: Callable[[int], object]) -> None:
    for part in corpus.documents:
        check_file(stored.folder, part.file)
        progress(part.file.nbytes)


def _verify_extra(folder: Path, extra: ExtraRecord) -> None:
    for states in read_streams(folder, extra.file).values():
        check_finite(folder / extra.file.name, states)


def _compacted(writer: SnapshotWriter, stored: StoredBank) -> BankRecord:
    record = stored.record
    if record.next_id > record.count:  # the library's file may keep what has left
        record = replace(record, index=None)
    if record.matrix is None:
        record = replace(record, matrix=write_matrix(writer, stored.content.embeddings))
    if stored.layout is None or not len(stored.content.ids):
        return replace(record, segments=())
    store = SnapshotStore()
    stored.attach_to(store, stored.content.ids)
    segments = write_segments(writer, stored.content, store, stored.layout)
    return replace(record, segments=tuple(each.record for each in segments))
