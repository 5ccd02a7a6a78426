"""Reading documents into a corpus: each from its own beginning, several at once, resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from memlong.bank.sizes import byte_count
from memlong.bank.validate import whole_number
from memlong.corpus.corpus import Corpus, check_unlimited
from memlong.corpus.document import Document
from memlong.decoder import MemoryDecoder
from memlong.decoder.retrievers.base import Passage
from memlong.errors import InvalidArgumentError
from memlong.evaluation.text import opening_tokens, tokenize

_PATIENCE = 30.0  # seconds between two saves
_AT_ONCE = 256 << 20  # bytes of keys and values in memory between two saves


@dataclass
class Outcome:
    """What became of documents: the sources of those read, those that were known, and those without space."""

    read: list[str]
    unchanged: list[str]
    left_out: list[str]


def remember(
    decoder: MemoryDecoder,
    corpus: Corpus,
    documents: Iterable[Document],
    *,
    rows: int = 1,
    budget: int | str | None = None,
    progress: Callable[[Document, int], object] = lambda *_: None,
) -> Outcome:
    """Read documents into a corpus, and save it in its folder after some time, after much was read, and at the end.

    Each is read as a text of its own, so that what is remembered of one does not depend on others. One that the corpus
    has is read again if its text has changed; if only what is known of it has, that is noted. Tokens at its end that do
    not fill a chunk are followed by line ends, and found by the end of the text instead, as many tokens as are
    embedded of a chunk. What has been saved need not be read again if the process ends early.
    A corpus without a folder is not saved.

    Parameters
    ----------
    decoder
        An attached decoder; its streams are reset. Its store holds a document while it is read.
    corpus
        Where they go.
    documents
        Read as they are asked for, so this may be a generator.
    rows
        How many documents to read side by side, which saves time on a GPU.
    budget
        Bytes of embeddings, keys and values, such as "8GB": a document that no longer fits is left out, and of one
        that has changed, what was read before stays.
    progress
        Called with a document and how many of its tokens were read since the last call.

    Raises
    ------
    MemlongError
        If the decoder is not attached.
    InvalidArgumentError
        If another model has filled the corpus, the decoder has no tokenizer, or an argument cannot be used.
    SnapshotError
        As `Corpus.save` does; if another process has changed the corpus, before anything is read.
    """
    rows = whole_number("rows", rows, at_least=1)
    most = None if budget is None else byte_count("budget", budget)
    if decoder.tokenizer is None:
        raise InvalidArgumentError(
            "decoder must have a tokenizer, which reads the documents: MemoryDecoder(model, tokenizer, config)"
        )
    corpus.check_folder()
    decoder.reset(bases=[corpus.bank])  # refuses a corpus of another model
    decoder.reset()
    check_unlimited(corpus.bank)
    check_unlimited(decoder.new_bank() or corpus.bank)
    outcome, saver = Outcome([], [], []), _Saver(corpus)
    fresh = unread(corpus, documents, outcome)
    try:
        while group := list(islice(fresh, rows)):
            fitting = _fitting(decoder, corpus, group, most, outcome)
            if fitting:
                _read(decoder, corpus, fitting, saver, progress)
                outcome.read += [document.source for document, _ in fitting]
    finally:  # what was read before an error, too
        saver.save()
    return outcome


@dataclass(frozen=True)
class _Laid:
    """The tokens of a document, and what goes before and after them so that all of them are in whole chunks."""

    lead: list[int]
    words: list[int]
    tail: list[int]

    @property
    def tokens(self) -> list[int]:
        return [*self.lead, *self.words, *self.tail]

    def chunks(self, decoder: MemoryDecoder) -> int:
        return (len(self.tokens) - decoder.config.sink_tokens) // decoder.config.chunk_size

    def ending(self, decoder: MemoryDecoder) -> Passage:
        """The end of the text, as long as what is embedded of a chunk if the text is."""
        read, config = [*self.lead, *self.words], decoder.config
        length = config.chunk_size + config.overlap_length
        start = max(min(config.sink_tokens, len(read) - 1), len(read) - length)
        return Passage(tuple(read[start:]), start)

    @classmethod
    def out(cls, decoder: MemoryDecoder, text: str) -> _Laid:
        """Lay out a text for a decoder."""
        config, tokenizer = decoder.config, decoder.tokenizer
        words = tokenize(tokenizer, text, begins=False)[0].tolist()
        space = tokenize(tokenizer, "\n", begins=False)[0].tolist()[-1:] or words[:1]
        opening = opening_tokens(tokenizer)
        lead = [*opening, *space * max(0, config.sink_tokens - len(opening))]
        rest = -(len(lead) + len(words) - config.sink_tokens) % config.chunk_size
        return cls(lead, words, space * rest)


class _Saver:
    """Saves a corpus now and then."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._then, self._bytes = time.monotonic(), 0

    def added(self, nbytes: int) -> None:
        """Note bytes that were added, and save if they are many."""
        self._bytes += nbytes
        if self._bytes >= _AT_ONCE or (self._bytes and time.monotonic() - self._then >= _PATIENCE):
            self.save(matrix=False)

    def save(self, *, matrix: bool = True) -> None:
        """Save now."""
        if self._corpus.folder is not None:
            self._corpus.save(matrix=matrix)
        self._then, self._bytes = time.monotonic(), 0


def unread(corpus: Corpus, documents: Iterable[Document], outcome: Outcome) -> Iterator[Document]:
    """Yield the documents that must be read; of the others, note that they are unchanged, and what is known of them."""
    seen: set[str] = set()
    for document in documents:
        if not isinstance(document, Document):
            raise InvalidArgumentError(f"documents must hold a Document each, got {document!r:.80}")
        if document.source in seen:
            raise InvalidArgumentError(f"documents holds two of the source {document.source!r:.200}")
        seen.add(document.source)
        known = corpus.get(document.source)
        if known is None or known.digest != document.digest or not corpus.holds_all_of(document.source):
            yield document
            continue
        if known.with_about(document.about) != known:
            corpus.change(document.about)
        outcome.unchanged.append(document.source)


def _fitting(
    decoder: MemoryDecoder,
    corpus: Corpus,
    group: Sequence[Document],
    most: int | None,
    outcome: Outcome,
) -> list[tuple[Document, _Laid]]:
    """Lay out documents, those that the budget has space for."""
    fitting, used = [], corpus.bank.nbytes
    one = decoder.layout.nbytes + corpus.bank.dim * np.dtype(np.float32).itemsize
    for document in group:
        laid = _Laid.out(decoder, document.text)
        known = corpus.get(document.source)
        more = (laid.chunks(decoder) - (0 if known is None else known.chunks)) * one
        used += more
        if most is not None and used > most:
            used -= more
            outcome.left_out.append(document.source)
        else:
            fitting.append((document, laid))
    return fitting


def _read(
    decoder: MemoryDecoder,
    corpus: Corpus,
    group: Sequence[tuple[Document, _Laid]],
    saver: _Saver,
    progress: Callable[[Document, int], object],
) -> None:
    """Read documents side by side, and move what is remembered of them into the corpus."""
    longest = max(len(laid.tokens) for _, laid in group)
    ids = torch.zeros(len(group), longest, dtype=torch.long, device="cpu")
    mask = torch.zeros_like(ids)
    for row, (_, laid) in enumerate(group):
        ids[row, : len(laid.tokens)] = torch.tensor(laid.tokens)
        mask[row, : len(laid.tokens)] = 1
    decoder.reset()
    for segment in decoder.stream(ids, mask, logits="last"):
        for row, (document, _) in enumerate(group):
            progress(document, int((segment.tokens[row] >= 0).sum()))
    decoder.flush()
    for bank, (document, laid) in zip(decoder.banks, group, strict=True):
        ending = None
        if laid.tail and laid.words and decoder.retriever is not None:
            ending = decoder.retriever.embed_chunks([laid.ending(decoder)])
        corpus.add(document, bank, tokens=laid.words, lead=len(laid.lead), ending=ending)
        saver.added(bank.nbytes)
    decoder.reset()
