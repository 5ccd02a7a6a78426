"""The documents of a corpus in its folder: what is known of each, and the tokens of its text, in files of some each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from memlong.bank.arrays import Ids
from memlong.bank.snapshot.files import damaged
from memlong.bank.snapshot.manifest import CorpusRecord, DocumentsRecord
from memlong.bank.snapshot.reader import StoredBank, folder_of, open_snapshot
from memlong.bank.snapshot.tensors import encode, read_arrays
from memlong.bank.snapshot.writer import SnapshotWriter
from memlong.corpus.document import Remembered
from memlong.errors import SnapshotError

_PART_BYTES = 16 << 20  # of JSON, and of tokens, after which the next file begins
_MOST_SMALL = 32


@dataclass(frozen=True, eq=False)
class Part:
    """Documents that were saved together, ascending by the ids of their chunks, and the file that holds them."""

    record: DocumentsRecord
    documents: tuple[Remembered, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its file."""
        return self.record.file.nbytes


@dataclass(frozen=True, eq=False)
class Table:
    """All documents of a corpus, ascending by the ids of their chunks, their tokens by source, and their files."""

    documents: tuple[Remembered, ...]
    tokens: Mapping[str, Ids]
    parts: tuple[Part, ...]


def read_table(folder: Path, record: CorpusRecord, next_id: int) -> Table:
    """Read and check the documents of a corpus whose bank gives the next chunk this id.

    Raises
    ------
    SnapshotError
        If a file is not what was saved, or describes what cannot be.
    """
    parts, tokens = [], {}
    for each in record.documents:
        part, words = _read_part(folder, each)
        parts.append(part)
        places = np.cumsum([0, *(document.tokens for document in part.documents)]).tolist()
        for document, (first, last) in zip(part.documents, pairwise(places), strict=True):
            if document.source in tokens:
                raise _odd(folder, each, f"two documents have the source {document.source!r:.200}")
            tokens[document.source] = words[first:last]
    documents = sorted((each for part in parts for each in part.documents), key=lambda each: each.first_id)
    ends = [0, *(each.first_id + each.chunks for each in documents)]
    begins = [*(each.first_id for each in documents), next_id]
    if any(begin < end for end, begin in zip(ends, begins, strict=True)):
        raise _odd(folder, record.documents[0], "the chunks of two documents overlap, or are not in the bank")
    return Table(tuple(documents), tokens, tuple(parts))


def list_documents(path: str | Path) -> tuple[Remembered, ...]:
    """Return the documents of the corpus in a folder; its bank is not read. None are in a bank or decoder.

    Raises
    ------
    SnapshotError
        As `read_table` does, or if there is no snapshot.
    """
    folder = folder_of(path)
    return open_snapshot(
        folder,
        lambda manifest: (
            ()
            if manifest.corpus is None
            else read_table(folder, manifest.corpus, manifest.banks[0].next_id).documents
        ),
        None,
    )


def check_documents(stored: StoredBank, record: CorpusRecord) -> None:
    """Check that the bank holds every chunk of every document, each of tokens that its text has.

    Raises
    ------
    SnapshotError
        Naming the first document of which that is not true, or as `read_table` does.
    """
    ids, spans = stored.content.ids, stored.content.spans
    size = 0 if stored.layout is None else stored.layout.shape[2]
    for document in read_table(stored.folder, record, stored.record.next_id).documents:
        first, last = np.searchsorted(ids, (document.first_id, document.first_id + document.chunks))
        where = f"the document {document.source!r:.200} of {str(stored.folder)!r}"
        if last - first < document.chunks:
            raise SnapshotError(
                f"{where} has {document.chunks:,} chunks, of which the bank holds {last - first:,}: read it again, "
                "with memlong remember"
            )
        own, end = spans[first:last], document.lead + document.tokens
        if ((own[:, 0] >= end) | (own[:, 1] >= end + size)).any():
            raise SnapshotError(
                f"{where} has {document.tokens:,} tokens, but chunks of what follows them: the snapshot is damaged. "
                "Get the folder from a copy, or read the document again"
            )


def write_table(
    writer: SnapshotWriter,
    before: Sequence[Part],
    documents: Mapping[str, Remembered],
    tokens: Mapping[str, Ids],
) -> tuple[Part, ...]:
    """Write the documents that no part from ``before`` holds as they are; parts that hold others, too, are dropped."""
    kept = _keepable([part for part in before if _is_current(part, documents)])
    on_disk = {each.source for part in kept for each in part.documents}
    fresh = [each for source, each in documents.items() if source not in on_disk]
    return (*kept, *_written(writer, fresh, tokens))


def _is_current(part: Part, documents: Mapping[str, Remembered]) -> bool:
    return all(documents.get(each.source) is each for each in part.documents)


def _keepable(parts: list[Part]) -> list[Part]:
    """Return the parts that need not be rewritten; of many small ones, none of these."""
    small_bytes = min(sum(each.nbytes for each in parts) // 16, _PART_BYTES // 2)
    small = [each for each in parts if each.nbytes < small_bytes]
    return [each for each in parts if each not in small] if len(small) > _MOST_SMALL else parts


def _written(
    writer: SnapshotWriter, documents: Sequence[Remembered], tokens: Mapping[str, Ids]
) -> Iterator[Part]:
    some: list[Remembered] = []
    told: list[bytes] = []
    json_bytes = token_bytes = 0
    for each in documents:
        some.append(each)
        told.append(json.dumps(each.as_json(), allow_nan=False).encode())
        json_bytes, token_bytes = json_bytes + len(told[-1]), token_bytes + tokens[each.source].nbytes
        if json_bytes >= _PART_BYTES or token_bytes >= _PART_BYTES:
            yield _write_part(writer, some, told, tokens)
            some, told, json_bytes, token_bytes = [], [], 0, 0
    if some:
        yield _write_part(writer, some, told, tokens)


def _write_part(
    writer: SnapshotWriter, documents: Sequence[Remembered], told: Sequence[bytes], tokens: Mapping[str, Ids]
) -> Part:
    content = b"[" + b",\n".join(told) + b"]"
    words = np.concatenate([np.empty(0, dtype=np.int32), *(tokens[each.source] for each in documents)])
    file = writer.write(
        "documents", encode({"documents": np.frombuffer(content, dtype=np.uint8), "tokens": words})
    )
    return Part(DocumentsRecord(len(documents), len(content), len(words), file), tuple(documents))


def _read_part(folder: Path, record: DocumentsRecord) -> tuple[Part, Ids]:
    shapes = {"documents": ("uint8", (record.json_bytes,)), "tokens": ("int32", (record.tokens,))}
    arrays = read_arrays(folder, record.file, shapes)
    words = arrays["tokens"]
    try:
        told = json.loads(arrays["documents"].tobytes().decode("utf-8"))
        if not isinstance(told, list) or len(told) != record.count:
            raise TypeError(f"{told!r:.80} is no list of {record.count:,}")
        documents = tuple(Remembered.of_json(each) for each in told)
        if sum(each.tokens for each in documents) != record.tokens:
            raise ValueError(f"they do not have {record.tokens:,} tokens")
        if words.min(initial=0) < 0:
            raise ValueError("a token id is below 0")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _odd(folder, record, str(error)) from error
    return Part(record, documents), words


def _odd(folder: Path, record: DocumentsRecord, why: str) -> SnapshotError:
    return damaged(folder / record.file.name, f"describes no documents ({why})")
