"""The manifest of a snapshot: what it holds, in which files, and limits on what it may claim."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from memlong.bank.snapshot.fields import Fields
from memlong.bank.snapshot.files import FileRecord, damaged, open_plain, read_fully, unreadable
from memlong.errors import SnapshotError

MANIFEST = "manifest.json"
FORMAT, VERSION = "memlong-snapshot", 3

Kind = Literal["bank", "decoder", "corpus"]

_MOST_BYTES = 32 << 20
_MOST_TOLD = 32 << 20  # bytes of JSON in one file of documents
_MOST = 2**48  # of anything counted
_WIDEST = 2**20
_LARGEST = 2**27  # numbers in the keys of one chunk
_MOST_LIMIT = 2**64  # of a bank's capacity, for which nothing is allocated


@dataclass(frozen=True)
class SegmentRecord:
    """Some chunks: ids, spans, embeddings and checksums in one file, keys and values in another."""

    count: int
    chunks: FileRecord
    blocks: FileRecord


@dataclass(frozen=True)
class IndexRecord:
    """The file of an index library, with what its backend needs to read it again."""

    facts: Mapping[str, Any]
    file: FileRecord


@dataclass(frozen=True)
class LayoutRecord:
    """Shape, dtype and device of a chunk's keys and values."""

    shape: tuple[int, ...]
    dtype: str
    device: str


@dataclass(frozen=True)
class BaseRecord:
    """A bank below the one that was saved.

    Attributes
    ----------
    identity : str
        Which bank it was, whatever it has held since.
    fingerprint : str
        The SHA-256 of what it held.
    chunks : int
        How many chunks.
    among : int or None
        How many of its chunks could be found; None for all.
    """

    identity: str
    fingerprint: str
    chunks: int
    among: int | None


@dataclass(frozen=True)
class BankRecord:
    """One bank.

    Attributes
    ----------
    identity : str
        32 random hexadecimal digits, which it has had since it was made.
    made_by : str
        Its class, as "module:Class".
    options : mapping
        The options of the backend's own.
    dim, metric, max_chunks, max_bytes, eviction, device
        Options of every bank; eviction is None where the policy has no name.
    count : int
        How many chunks are held; the segments may hold more, which have left the bank since.
    next_id, clock : int
        The id of the next chunk, and the clock of its usage.
    layout : LayoutRecord or None
        Layout of the chunks; None if none was ever added.
    origin : mapping or None
        Which model made the chunks, if the bank knows.
    state : FileRecord
        Which chunks are held, how they were used, and which of the bases could be found.
    segments : tuple of SegmentRecord
        Where the chunks are.
    index : IndexRecord or None
        The native index, where there is one.
    matrix : FileRecord or None
        The embeddings of all chunks that are held once more, float32 [count, dim] and nothing else, to be mapped.
    bases : tuple of BaseRecord
        The banks that it lay over, which are not in the folder.
    """

    identity: str
    made_by: str
    options: Mapping[str, Any]
    dim: int
    metric: str
    max_chunks: int | None
    max_bytes: int | None
    eviction: str | None
    device: str
    count: int
    next_id: int
    clock: int
    layout: LayoutRecord | None
    origin: Mapping[str, Any] | None
    state: FileRecord
    segments: tuple[SegmentRecord, ...]
    index: IndexRecord | None
    matrix: FileRecord | None = None
    bases: tuple[BaseRecord, ...] = ()

    @property
    def files(self) -> list[FileRecord]:
        """All files that hold it."""
        segments = [file for each in self.segments for file in (each.chunks, each.blocks)]
        index, matrix = ([self.index.file] if self.index else []), ([self.matrix] if self.matrix else [])
        return [self.state, *segments, *index, *matrix]


@dataclass(frozen=True)
class ExtraRecord:
    """What a decoder saves in addition to its banks."""

    facts: Mapping[str, Any]
    file: FileRecord


@dataclass(frozen=True)
class DocumentsRecord:
    """Some documents of a corpus: how many, and how many bytes of JSON and tokens of theirs a file holds."""

    count: int
    json_bytes: int
    tokens: int
    file: FileRecord


@dataclass(frozen=True)
class CorpusRecord:
    """What a corpus saves in addition to its bank: notes of its maker, and its documents."""

    notes: Mapping[str, Any]
    documents: tuple[DocumentsRecord, ...]


@dataclass(frozen=True)
class Manifest:
    """What a folder holds at one moment.

    Attributes
    ----------
    kind : "bank", "decoder" or "corpus"
        What was saved.
    token : str
        Identifies this state: 32 random hexadecimal digits.
    generation : int
        The number of this state in the folder, from 1.
    versions : mapping
        Versions of the packages that wrote it.
    banks : tuple of BankRecord
        One for a bank or a corpus, one for each row of a decoder.
    extra : ExtraRecord or None
        The rest of a decoder.
    corpus : CorpusRecord or None
        The rest of a corpus.
    """

    kind: Kind
    token: str
    generation: int
    versions: Mapping[str, str]
    banks: tuple[BankRecord, ...]
    extra: ExtraRecord | None = None
    corpus: CorpusRecord | None = None

    @property
    def files(self) -> list[FileRecord]:
        """All files that hold it."""
        own = [file for bank in self.banks for file in bank.files]
        own += [self.extra.file] if self.extra else []
        return own + ([each.file for each in self.corpus.documents] if self.corpus else [])

    def to_bytes(self) -> bytes:
        """Return the content of the manifest's file."""
        return _dumped({"format": FORMAT, "version": VERSION, **asdict(self)})


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a folder.

    Raises
    ------
    SnapshotError
        If there is none, or it is damaged, of another version, or claims something impossible.
    """
    path = folder / MANIFEST
    return parse_manifest(path, _content(path))


def is_state(folder: Path, token: str) -> bool:
    """Whether a folder still has the state with a token; much faster than reading the manifest again."""
    return token.encode() in _content(folder / MANIFEST)


def parse_manifest(path: Path, content: bytes | bytearray) -> Manifest:
    """Check the content of a manifest's file, as `read_manifest`."""
    data = _parsed(path, content)
    top = Fields(data, path)
    top.text("format"), top.integer("version")
    _check_layout(path, data)
    banks = tuple(_bank(each) for each in top.parts("banks"))
    found = Manifest(
        kind=top.choice("kind", ("bank", "decoder", "corpus")),
        token=top.hexadecimal("token", 32),
        generation=top.integer("generation", 1, _MOST),
        versions=top.mapping("versions"),
        banks=banks,
        extra=_extra(top.part_or_none("extra")),
        corpus=_corpus(top.part_or_none("corpus")),
    )
    top.nothing_else()
    names = [file.name for file in found.files]
    if len(set(names)) < len(names):
        raise damaged(path, f"names {max(names, key=names.count)!r} more than once")
    if found.kind == "bank" and (len(banks) != 1 or found.extra or found.corpus):
        raise damaged(path, f"says that it holds one bank, but describes {len(banks)} and other things")
    if found.kind == "corpus" and (len(banks) != 1 or found.extra or not found.corpus):
        raise damaged(path, f"says that it holds a corpus, but describes {len(banks)} banks, or no documents")
    if found.kind == "decoder" and (not found.extra or found.corpus):
        raise damaged(path, "says that it holds a decoder, but describes no streams, or documents")
    return found


def _check_layout(path: Path, data: Mapping[str, Any]) -> None:
    """Raise SnapshotError for what was written before the format was what it is now; no release wrote that."""
    if "corpus" not in data:
        raise SnapshotError(
            f"{str(path)!r} was written by a memlong from before the first release, and cannot be read by this one. "
            "Read the texts again, into a new folder"
        )


def has_manifest(folder: Path) -> bool:
    """Whether there is a manifest in a folder."""
    try:
        (folder / MANIFEST).lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise unreadable(folder / MANIFEST, error) from error
    return True


def _dumped(body: Mapping[str, Any]) -> bytes:
    text = json.dumps(body, indent=1, allow_nan=False).encode()
    return text[:-2] + _signature(text)


def _signature(text: bytes) -> bytes:
    """What ends a manifest's file, in place of the end of its text."""
    return f',\n "sha256": "{hashlib.sha256(text).hexdigest()}"\n}}\n'.encode()


_SIGNED = len(_signature(b""))


def _content(path: Path) -> bytearray:
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size  # of this very file: another may have its name by now
        _check_size(path, size)
        content = bytearray(size)
        read_fully(file, path, content)
    return content


def _check_size(path: Path, size: int) -> None:
    if size > _MOST_BYTES:
        raise damaged(path, f"has {size:,} bytes, more than a manifest ever has")


def _parsed(path: Path, content: bytes | bytearray) -> dict[str, Any]:
    _check_size(path, len(content))
    try:
        data = json.loads(content, parse_constant=_no_number)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise damaged(path, "is not a manifest of memlong")
        version = data.get("version")
        if version != VERSION:
            is_newer = type(version) is int and version > VERSION
            raise SnapshotError(
                f"{str(path)!r} has the format version {version!r:.80}, but this memlong reads version {VERSION}. "
                + ("Use a newer memlong" if is_newer else "Use the memlong that wrote it, or write it anew")
            )
        data.pop("sha256", None)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"is not the JSON that was written ({error})") from error
    text = bytes(content[:-_SIGNED]) + b"\n}"
    if text[:-2] + _signature(text) != content:
        raise damaged(path, "is not what its SHA-256 says")
    return data


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _bank(fields: Fields) -> BankRecord:
    found = BankRecord(
        identity=fields.hexadecimal("identity", 32),
        made_by=fields.text("made_by"),
        options=fields.mapping("options"),
        dim=fields.integer("dim", 1, _WIDEST),
        metric=fields.choice("metric", ("cosine", "inner_product", "l2")),
        max_chunks=fields.integer_or_none("max_chunks", 1, _MOST_LIMIT),
        max_bytes=fields.integer_or_none("max_bytes", 1, _MOST_LIMIT),
        eviction=fields.text_or_none("eviction"),
        device=fields.text("device"),
        count=fields.integer("count", 0, _MOST),
        next_id=fields.integer("next_id", 0, 2**62),
        clock=fields.integer("clock", 0, 2**62),
        layout=_layout(fields.part_or_none("layout")),
        origin=fields.mapping_or_none("origin"),
        state=_file(fields.part("state")),
        segments=tuple(_segment(each) for each in fields.parts("segments")),
        index=_index(fields.part_or_none("index")),
        matrix=_file_or_none(fields.part_or_none("matrix")),
        bases=tuple(_base(each) for each in fields.parts("bases")),
    )
    fields.nothing_else()
    return found


def _base(fields: Fields) -> BaseRecord:
    found = BaseRecord(
        identity=fields.hexadecimal("identity", 32),
        fingerprint=fields.hexadecimal("fingerprint", 64),
        chunks=fields.integer("chunks", 0, _MOST),
        among=fields.integer_or_none("among", 0, _MOST),
    )
    fields.nothing_else()
    return found


def _layout(fields: Fields | None) -> LayoutRecord | None:
    if fields is None:
        return None
    shape = fields.integers("shape", 4, 1, _WIDEST)
    if math.prod(shape) > _LARGEST:
        raise fields.odd("shape", list(shape), f"at most {_LARGEST:,} numbers in the keys of a chunk")
    found = LayoutRecord(shape, dtype=fields.text("dtype"), device=fields.text("device"))
    fields.nothing_else()
    return found


def _segment(fields: Fields) -> SegmentRecord:
    found = SegmentRecord(
        count=fields.integer("count", 1, _MOST),
        chunks=_file(fields.part("chunks")),
        blocks=_file(fields.part("blocks")),
    )
    fields.nothing_else()
    return found


def _index(fields: Fields | None) -> IndexRecord | None:
    if fields is None:
        return None
    found = IndexRecord(facts=fields.mapping("facts"), file=_file(fields.part("file")))
    fields.nothing_else()
    return found


def _extra(fields: Fields | None) -> ExtraRecord | None:
    if fields is None:
        return None
    found = ExtraRecord(facts=fields.mapping("facts"), file=_file(fields.part("file")))
    fields.nothing_else()
    return found


def _corpus(fields: Fields | None) -> CorpusRecord | None:
    if fields is None:
        return None
    found = CorpusRecord(
        notes=fields.mapping("notes"), documents=tuple(_documents(each) for each in fields.parts("documents"))
    )
    fields.nothing_else()
    return found


def _documents(fields: Fields) -> DocumentsRecord:
    found = DocumentsRecord(
        count=fields.integer("count", 1, _MOST_TOLD),
        json_bytes=fields.integer("json_bytes", 1, _MOST_TOLD),
        tokens=fields.integer("tokens", 0, _MOST),
        file=_file(fields.part("file")),
    )
    fields.nothing_else()
    return found


def _file_or_none(fields: Fields | None) -> FileRecord | None:
    return None if fields is None else _file(fields)


def _file(fields: Fields) -> FileRecord:
    found = FileRecord(
        name=fields.file_name("name"),
        nbytes=fields.integer("nbytes", 0, _MOST),
        sha256=fields.hexadecimal("sha256", 64),
    )
    fields.nothing_else()
    return found
