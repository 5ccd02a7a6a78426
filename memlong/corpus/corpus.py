"""Corpus: a bank, the documents in it, and the folder that both are saved in."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from memlong.bank import Ids, MemoryBank
from memlong.bank.snapshot.lazy import SnapshotStore
from memlong.bank.snapshot.manifest import CorpusRecord, Manifest, has_manifest, read_manifest
from memlong.bank.snapshot.reader import folder_of, open_snapshot, read_bank
from memlong.bank.snapshot.saving import write_bank
from memlong.bank.snapshot.writer import SnapshotWriter
from memlong.corpus.document import About, Document, Remembered
from memlong.corpus.table import Part, read_table, write_table
from memlong.errors import InvalidArgumentError, MemlongError, SnapshotError
from memlong.plugins import Registry
from memlong.plugins.registry import installed_registry

if TYPE_CHECKING:
    from memlong.decoder import MemoryDecoder

_AT_ONCE = 64  # chunks


@dataclass(frozen=True, eq=False)
class _State:
    """What a folder holds of the documents, in the state of this token."""

    token: str
    parts: tuple[Part, ...]


class Corpus:
    """Documents that a model has read, each from its own beginning, in one bank.

    Sessions read the bank as a base (``decoder.reset(bases=[corpus.bank])``): it stays on disk, where each block of
    keys and values is read when it is needed, and is in memory once however many sessions there are.

    Parameters
    ----------
    bank : MemoryBank
        Holds the chunks of the documents, and no others.
    documents : iterable of Remembered
        The documents.
    tokens : mapping of str to numpy.ndarray
        Token ids [tokens] of each document's text, by its source.
    notes : mapping
        What its maker wants to know again, as JSON can hold it: the model's name, say.

    Attributes
    ----------
    folder
        Where it was loaded from or saved to last; None before.

    Examples
    --------
    >>> corpus = Corpus.open("manual", decoder)  # doctest: +SKIP
    >>> with decoder:  # doctest: +SKIP
    ...     remember(decoder, corpus, [Document("a.txt", text=Path("a.txt").read_text())])
    """

    def __init__(
        self,
        bank: MemoryBank,
        documents: Iterable[Remembered] = (),
        tokens: Mapping[str, Ids] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.bank = bank
        self.notes = dict(notes or {})
        self.folder: Path | None = None
        self._lock = RLock()
        # Ascending by the ids of their chunks, as a document that is read goes to the end.
        in_order = sorted(documents, key=lambda each: each.first_id)
        self._documents = {each.source: each for each in in_order}
        self._order: tuple[list[int], tuple[Remembered, ...]] | None = (
            None  # their first ids and they, to look up
        )
        self._tokens = dict(tokens or {})
        self._states: dict[Path, _State] = {}  # by folder, what it held last
        self._has_forgotten = False

    @classmethod
    def load(
        cls, path: str | Path, backend: str | None = None, *, registry: Registry | None = None, **options: Any
    ) -> Corpus:
        """Load what `save` wrote, with keys and values left on disk.

        Parameters
        ----------
        path
            The folder.
        backend
            Name of the backend; the saved one by default.
        registry
            Where its name is looked up.
        **options
            As `memlong.load_bank` takes them; ``lazy=False`` reads keys and values into memory.

        Raises
        ------
        SnapshotError
            If the folder holds no corpus, or a damaged one.
        InvalidArgumentError, DeviceUnavailableError
            As `memlong.load_bank` does.
        """
        folder = folder_of(path)
        kv_device = options.pop("kv_device", None)
        most_bytes = options.pop("most_bytes", None)
        options.setdefault("lazy", options.get("store") is None)

        def loaded(manifest: Manifest) -> Corpus:
            if manifest.corpus is None:
                raise SnapshotError(
                    f"{str(folder)!r} holds the snapshot of a {manifest.kind}, and no corpus: name a folder that "
                    "`Corpus.save` wrote"
                )
            stored = read_bank(folder, manifest, None, kv_device)
            table = read_table(folder, manifest.corpus, stored.record.next_id)
            bank = (registry or installed_registry()).bank_of(stored, backend, **options)
            found = cls(bank, table.documents, table.tokens, manifest.corpus.notes)
            found.folder = folder
            found._states[folder.resolve()] = _State(manifest.token, table.parts)
            return found

        return open_snapshot(folder, loaded, most_bytes)

    @classmethod
    def open(cls, path: str | Path, decoder: MemoryDecoder, notes: Mapping[str, Any] | None = None) -> Corpus:
        """Load the corpus in a folder for a decoder to read more into, or begin one there, in the decoder's backend.

        Parameters
        ----------
        path
            The folder.
        decoder
            The decoder.
        notes
            Notes of a corpus that is begun.

        Raises
        ------
        MemlongError
            If the decoder has no backend.
        SnapshotError
            As `load` and `save` do.
        InvalidArgumentError
            If the decoder's banks have a capacity: a corpus keeps every document.
        """
        bank, folder = decoder.new_bank(), folder_of(path)
        if bank is None:
            raise MemlongError("A corpus needs a backend, but the configuration has backend=None: name one")
        check_unlimited(bank)
        if not has_manifest(folder):
            cls(bank, notes=notes).save(folder)
        return cls.load(
            folder, decoder.config.backend, registry=decoder.registry, kv_device=str(decoder.model.device)
        )

    @property
    def documents(self) -> tuple[Remembered, ...]:
        """The documents, in the order in which they were read."""
        return tuple(self._documents.values())

    def __len__(self) -> int:
        return len(self._documents)

    def __contains__(self, source: object) -> bool:
        return source in self._documents

    def __getitem__(self, source: str) -> Remembered:
        return self._documents[source]

    def get(self, source: str) -> Remembered | None:
        """Return the document of a source; None if there is none."""
        return self._documents.get(source)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} documents, {self.bank!r})"

    def tokens_of(self, source: str) -> torch.Tensor:
        """Return the token ids [tokens] of a document's text, int64."""
        return torch.from_numpy(self._tokens[source].astype(np.int64))

    def document_of(self, chunk_id: int) -> Remembered | None:
        """Return the document that a chunk is of; None if there is none."""
        order = self._order
        if order is None:
            with self._lock:
                documents = self.documents
                order = self._order = [each.first_id for each in documents], documents
        firsts, documents = order
        place = bisect_right(firsts, chunk_id) - 1
        found = documents[place] if place >= 0 else None
        return found if found is not None and found.holds(chunk_id) else None

    def ids(
        self,
        *,
        tags: Sequence[str] = (),
        sources: Sequence[str] = (),
        since: float | None = None,
        until: float | None = None,
        now: float | None = None,
    ) -> torch.Tensor:
        """Return the ids of the chunks of some documents, int64 [n], ascending.

        Parameters
        ----------
        tags
            Documents with all of these.
        sources
            Documents of these sources; none for any.
        since, until
            Documents of a time in [since, until), in seconds since 1970; one of an unknown time is in neither.
        now
            Documents that have not expired at this time; the clock's by default.
        """
        if isinstance(tags, str) or isinstance(sources, str):
            raise InvalidArgumentError("tags and sources must be sequences of words, got a text")
        moment = time.time() if now is None else now
        chosen = [
            np.arange(each.first_id, each.first_id + each.chunks, dtype=np.int64)
            for each in self.documents
            if set(tags) <= set(each.tags)
            and (not sources or each.source in sources)
            and (each.expires is None or moment < each.expires)
            and (since is None or (each.time is not None and each.time >= since))
            and (until is None or (each.time is not None and each.time < until))
        ]
        return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *chosen]))

    def add(
        self,
        document: Document,
        bank: MemoryBank,
        *,
        tokens: Sequence[int],
        lead: int,
        ending: torch.Tensor | None = None,
    ) -> None:
        """Take the chunks of a document that was read; one of the same source leaves.

        Parameters
        ----------
        document
            The document.
        bank
            Holds its chunks alone.
        tokens
            Token ids of its text.
        lead
            How many tokens were read before them.
        ending
            What its last chunk is found by [1, dim], in place of its embedding in ``bank``.
        """
        with self._lock:
            first = self.bank.next_id
            try:
                _copy(bank, self.bank, ending)
            except BaseException:
                held = self.bank.ids
                self.bank.remove(held[held >= first])
                raise
            before = self._documents.get(document.source)
            if before is not None:
                self._remove_chunks([before])
                del self._documents[document.source]  # the new one is last
            self._documents[document.source] = Remembered(
                **vars(document.about),
                digest=document.digest,
                tokens=len(tokens),
                lead=lead,
                first_id=first,
                chunks=self.bank.next_id - first,
            )
            self._tokens[document.source] = np.array(tokens, dtype=np.int32)
            self._order = None

    def holds_all_of(self, source: str) -> bool:
        """Whether the bank holds every chunk of a document."""
        found = self._documents[source]
        ids = torch.arange(found.first_id, found.first_id + found.chunks)
        return bool((self.bank.spans_of(ids) >= 0).all())

    def change(self, about: About) -> None:
        """Give a document other metadata; its text stays, and is not read again.

        Raises
        ------
        InvalidArgumentError
            If there is none of this source.
        """
        with self._lock:
            self._documents[about.source] = self._known(about.source).with_about(about)
            self._order = None

    def forget(self, *sources: str) -> None:
        """Remove documents; the next `save` rewrites what was saved with them, so that nothing of them remains there.

        Raises
        ------
        InvalidArgumentError
            If there is none of a source; all stay then.
        """
        with self._lock:
            self._remove_chunks([self._known(each) for each in sources])
            for each in dict.fromkeys(sources):
                del self._documents[each], self._tokens[each]
            self._order = None

    def expire(self, now: float | None = None) -> list[str]:
        """Forget the documents whose time has come, by the clock unless ``now`` is given; return their sources."""
        moment = time.time() if now is None else now
        gone = [each.source for each in self.documents if each.expires is not None and each.expires <= moment]
        self.forget(*gone)
        return gone

    def check_folder(self) -> None:
        """Raise SnapshotError if another process has saved into the folder since, so that `save` would be refused."""
        with self._lock:
            if self.folder is not None and has_manifest(self.folder):
                self._known_in(self.folder, read_manifest(self.folder))

    def save(self, path: str | Path | None = None, *, matrix: bool = True) -> None:
        """Write the corpus into a folder, by default its own; what has changed, if it was saved or loaded there.

        The folder holds the previous state or this one, whenever the process ends. Keys and values that are saved need
        no longer be in memory, and are read from there if the corpus was loaded with them on disk.

        Parameters
        ----------
        path
            The folder.
        matrix
            Whether to write all embeddings once more, as one matrix that processes which load the corpus have in memory
            once. False saves time where more is to be added soon.

        Raises
        ------
        SnapshotError
            If it cannot be written, or another process has changed the corpus in this folder.
        InvalidArgumentError
            If no folder is named, and the corpus has none.
        """
        if path is None and self.folder is None:
            raise InvalidArgumentError("path must name a folder: the corpus was not loaded from one")
        folder, state = folder_of(path or self.folder or ""), self.bank.state
        with self._lock, SnapshotWriter(folder, "corpus") as writer:
            known = self._known_in(folder, writer.current)
            saved = write_bank(self.bank, writer, forgets=self._has_forgotten, matrix=matrix)
            parts = write_table(writer, known, self._documents, self._tokens)
            record = CorpusRecord(self.notes, tuple(each.record for each in parts))
            writer.commit([saved.record], corpus=record)
            state.saved = saved
            self._states[folder.resolve()] = _State(writer.token, parts)
            self._has_forgotten, self.folder = False, folder
            if isinstance(state.store, SnapshotStore):
                with state.writing():
                    state.store.settle(folder, saved, self.bank.layout)

    def _known_in(self, folder: Path, current: Manifest | None) -> tuple[Part, ...]:
        """Return what a folder holds of the documents; SnapshotError if another process has saved there."""
        if current is None:
            return ()
        ours = self._states.get(folder.resolve())
        if ours is None or ours.token != current.token:
            raise SnapshotError(
                f"{str(folder)!r} was changed since this corpus was loaded, and would lose that: load it again, or "
                "save to another folder"
            )
        return ours.parts

    def _known(self, source: str) -> Remembered:
        found = self._documents.get(source)
        if found is None:
            raise InvalidArgumentError(f"the corpus has no document of the source {source!r:.200}")
        return found

    def _remove_chunks(self, documents: Sequence[Remembered]) -> None:
        if not documents:
            return
        chunks = [torch.arange(each.first_id, each.first_id + each.chunks) for each in documents]
        ids = torch.cat(chunks).unique()
        self.bank.remove(ids[self.bank.spans_of(ids)[:, 0] >= 0])
        self._has_forgotten = True


def check_unlimited(bank: MemoryBank) -> None:
    """Raise InvalidArgumentError if a bank evicts chunks, since a corpus keeps every document."""
    capacity = bank.top.state.capacity
    if capacity.max_chunks is not None or capacity.max_bytes is not None:
        raise InvalidArgumentError(
            "a corpus keeps every document, but its bank, or the decoder's, has max_chunks or max_bytes: leave them "
            "out, and limit what is read with remember(budget=...)"
        )


def _copy(bank: MemoryBank, into: MemoryBank, ending: torch.Tensor | None) -> None:
    """Add the chunks of a bank to another, a few at a time, the last with the embedding ``ending`` if it is given."""
    held = bank.embeddings
    if ending is not None and len(held.ids):
        held.embeddings[-1:] = ending
    if not len(into):
        into.origin = bank.origin
    for start in range(0, len(held.ids), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        found = bank.fetch(held.ids[part])
        into.add(held.embeddings[part], found.keys, found.values, found.spans)
