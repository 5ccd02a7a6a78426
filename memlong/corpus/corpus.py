"""Corpus: a bank, the documents in it, and the folder that both are saved in."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch

from memlong.bank import Ids, MemoryBank
from memlong.bank.snapshot.files import damaged
from memlong.bank.snapshot.lazy import SnapshotStore
from memlong.bank.snapshot.manifest import MANIFEST, ExtraRecord, Manifest, has_manifest
from memlong.bank.snapshot.reader import folder_of, open_snapshot, read_bank
from memlong.bank.snapshot.saving import write_bank
from memlong.bank.snapshot.tensors import encode, read_arrays
from memlong.bank.snapshot.writer import SnapshotWriter
from memlong.corpus.document import About, Document, Remembered
from memlong.decoder import MemoryDecoder
from memlong.errors import InvalidArgumentError, MemlongError, SnapshotError
from memlong.plugins import Registry
from memlong.plugins.registry import installed_registry

_AT_ONCE = 64  # chunks


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
        self._documents = {each.source: each for each in documents}
        self._tokens = dict(tokens or {})
        self._has_forgotten = False
        self._sort()

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
            if manifest.kind != "corpus" or manifest.extra is None:
                raise SnapshotError(
                    f"{str(folder)!r} holds the snapshot of a {manifest.kind}, and no corpus: name a folder that "
                    "`Corpus.save` wrote"
                )
            stored = read_bank(folder, manifest, None, kv_device)
            documents, tokens = _read_documents(folder, manifest.extra, stored.record.next_id)
            bank = (registry or installed_registry()).bank_of(stored, backend, **options)
            notes = manifest.extra.facts.get("notes", {})
            found = cls(bank, documents, tokens, notes if isinstance(notes, dict) else {})
            found.folder = folder
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
        return tuple(self._in_order)

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
        place = bisect_right(self._firsts, chunk_id) - 1
        found = self._in_order[place] if place >= 0 else None
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
            for each in self._in_order
            if set(tags) <= set(each.tags)
            and (not sources or each.source in sources)
            and (each.expires is None or moment < each.expires)
            and (since is None or (each.time is not None and each.time >= since))
            and (until is None or (each.time is not None and each.time < until))
        ]
        return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *chosen]))

    def add(self, document: Document, bank: MemoryBank, *, tokens: Sequence[int], lead: int) -> None:
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
        """
        with self._lock:
            first = self.bank.next_id
            try:
                _copy(bank, self.bank)
            except BaseException:
                held = self.bank.ids
                self.bank.remove(held[held >= first])
                raise
            before = self._documents.get(document.source)
            if before is not None:
                self._remove_chunks(before)
            self._documents[document.source] = Remembered(
                **asdict(document.about),
                digest=document.digest,
                tokens=len(tokens),
                lead=lead,
                first_id=first,
                chunks=self.bank.next_id - first,
            )
            self._tokens[document.source] = np.array(tokens, dtype=np.int32)
            self._sort()

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
            self._sort()

    def forget(self, source: str) -> None:
        """Remove a document; the next `save` rewrites the folder, so that nothing of it remains there.

        Raises
        ------
        InvalidArgumentError
            If there is none of this source.
        """
        with self._lock:
            self._remove_chunks(self._known(source))
            del self._documents[source], self._tokens[source]
            self._sort()

    def expire(self, now: float | None = None) -> list[str]:
        """Forget the documents whose time has come, by the clock unless ``now`` is given; return their sources."""
        moment = time.time() if now is None else now
        gone = [each.source for each in self._in_order if each.expires is not None and each.expires <= moment]
        for source in gone:
            self.forget(source)
        return gone

    def save(self, path: str | Path | None = None) -> None:
        """Write the corpus into a folder, by default its own; what has changed, if it was saved or loaded there.

        The folder holds the previous state or this one, whenever the process ends. Keys and values that are saved need
        no longer be in memory, and are read from there if the corpus was loaded with them on disk.

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
            ours = None if state.saved is None else state.saved.token
            if writer.current is not None and writer.current.token != ours:
                raise SnapshotError(
                    f"{str(folder)!r} was changed since this corpus was loaded, and would lose that: load it again, "
                    "or save to another folder"
                )
            saved = write_bank(self.bank, writer, forgets=self._has_forgotten)
            words = [self._tokens[each.source] for each in self._in_order]
            arrays = {"tokens": np.concatenate([np.empty(0, dtype=np.int32), *words])}
            facts = {"documents": [asdict(each) for each in self._in_order], "notes": self.notes}
            writer.commit([saved.record], ExtraRecord(facts, writer.write("documents", encode(arrays))))
            state.saved = saved
            self._has_forgotten, self.folder = False, folder
            if isinstance(state.store, SnapshotStore):
                with state.writing():
                    state.store.settle(folder, saved, self.bank.layout)

    def _known(self, source: str) -> Remembered:
        found = self._documents.get(source)
        if found is None:
            raise InvalidArgumentError(f"the corpus has no document of the source {source!r:.200}")
        return found

    def _remove_chunks(self, document: Remembered) -> None:
        held = torch.arange(document.first_id, document.first_id + document.chunks)
        self.bank.remove(held[torch.isin(held, self.bank.ids)])
        self._has_forgotten = True

    def _sort(self) -> None:
        self._in_order = sorted(self._documents.values(), key=lambda each: each.first_id)
        self._firsts = [each.first_id for each in self._in_order]


def _read_documents(
    folder: Path, extra: ExtraRecord, next_id: int
) -> tuple[list[Remembered], dict[str, Ids]]:
    try:
        told = extra.facts["documents"]
        if not isinstance(told, list):
            raise TypeError(f"{told!r:.80} is no list")
        documents = [Remembered.of_json(each) for each in told]
        if len({each.source for each in documents}) < len(documents):
            raise ValueError("two documents have one source")
        ends = [0, *(each.first_id + each.chunks for each in documents)]
        begins = [*(each.first_id for each in documents), next_id]
        if any(begin < end for end, begin in zip(ends, begins, strict=True)):
            raise ValueError("the chunks of two documents overlap, or are not in the bank")
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder / MANIFEST, f"describes no documents ({error})") from error
    total = sum(each.tokens for each in documents)
    tokens = read_arrays(folder, extra.file, {"tokens": ("int32", (total,))})["tokens"]
    places = np.cumsum([0, *(each.tokens for each in documents)])
    return documents, {
        each.source: tokens[places[row] : places[row + 1]] for row, each in enumerate(documents)
    }


def check_unlimited(bank: MemoryBank) -> None:
    """Raise InvalidArgumentError if a bank evicts chunks, since a corpus keeps every document."""
    capacity = bank.top.state.capacity
    if capacity.max_chunks is not None or capacity.max_bytes is not None:
        raise InvalidArgumentError(
            "a corpus keeps every document, but its bank, or the decoder's, has max_chunks or max_bytes: leave them "
            "out, and limit what is read with remember(budget=...)"
        )


def _copy(bank: MemoryBank, into: MemoryBank) -> None:
    """Add the chunks of a bank to another, a few at a time."""
    held = bank.embeddings
    if not len(into):
        into.origin = bank.origin
    for start in range(0, len(held.ids), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        found = bank.fetch(held.ids[part])
        into.add(held.embeddings[part], found.keys, found.values, found.spans)
