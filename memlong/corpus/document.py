"""Documents: what is to be read, and what is known of one that was."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, replace
from typing import Any, Self

from memlong.errors import InvalidArgumentError

_LONGEST = 4096
_LATEST = 1e15  # seconds, which is false for NaN and infinity
_MOST_TAGS = 256
_FIELDS = ("source", "title", "time", "tags", "expires", "digest", "tokens", "lead", "first_id", "chunks")


@dataclass(frozen=True)
class About:
    """What is known of a document besides its text.

    Attributes
    ----------
    source
        Where it is from, such as a path or an address; a corpus has one document of each source.
    title
        Its name, for people.
    time
        When it was written, in seconds since 1970; None if unknown.
    tags
        Words to filter by.
    expires
        From when on `Corpus.ids` leaves it out and `Corpus.expire` forgets it, in seconds since 1970; None for never.
    """

    source: str
    _: KW_ONLY
    title: str = ""
    time: float | None = None
    tags: tuple[str, ...] = ()
    expires: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tags, str):
            raise InvalidArgumentError(f"tags must be a sequence of words, got the text {self.tags!r:.80}")
        object.__setattr__(self, "tags", tuple(self.tags))
        if len(self.tags) > _MOST_TAGS:
            raise InvalidArgumentError(f"tags must be at most {_MOST_TAGS} words, got {len(self.tags):,}")
        for name, text in (
            ("source", self.source),
            ("title", self.title),
            *(("tags", tag) for tag in self.tags),
        ):
            if not isinstance(text, str) or len(text) > _LONGEST or "\0" in text:
                raise InvalidArgumentError(
                    f"{name} must be text of at most {_LONGEST:,} characters, got {text!r:.80}"
                )
        if not self.source:
            raise InvalidArgumentError("source must not be empty: name where the document is from")
        for name, value in (("time", self.time), ("expires", self.expires)):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and abs(value) < _LATEST):
                raise InvalidArgumentError(f"{name} must be seconds since 1970, or None, got {value!r:.80}")


@dataclass(frozen=True)
class Document(About):
    """A document to read.

    Attributes
    ----------
    text
        The text itself.
    """

    text: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.text, str):
            raise InvalidArgumentError(f"text must be text, got {self.text!r:.80}")

    @property
    def about(self) -> About:
        """What is known of it besides its text."""
        return About(**{name: getattr(self, name) for name in About.__dataclass_fields__})

    @property
    def digest(self) -> str:
        """The SHA-256 of its text, by which a changed document is told from an unchanged one."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Remembered(About):
    """A document that was read.

    Attributes
    ----------
    digest
        The SHA-256 of its text.
    tokens
        How many tokens its text has.
    lead
        How many tokens were read before its first: those that every stream keeps as sinks are in no chunk.
    first_id
        The id of its first chunk; the others follow.
    chunks
        How many chunks it has.
    """

    digest: str = ""
    tokens: int = 0
    lead: int = 0
    first_id: int = 0
    chunks: int = 0

    def with_about(self, about: About) -> Self:
        """Return the same with other metadata."""
        return replace(self, **asdict(about))

    def holds(self, chunk_id: int) -> bool:
        """Whether a chunk is of this document."""
        return self.first_id <= chunk_id < self.first_id + self.chunks

    def span_in_text(self, start: int, end: int) -> tuple[int, int]:
        """Return which tokens of its text [start, end) a chunk has, of what it has of the stream that was read."""
        first, last = (min(max(each - self.lead, 0), self.tokens) for each in (start, end))
        return first, last

    def as_json(self) -> dict[str, Any]:
        """Return what a file says, for `of_json`."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def of_json(cls, told: Any) -> Self:
        """Return what a file says; TypeError or ValueError if it cannot be."""
        if not isinstance(told, Mapping) or told.keys() != set(_FIELDS) or not isinstance(told["tags"], list):
            raise TypeError(f"{told!r:.80} does not describe one")
        found = cls(**told)
        for name in ("tokens", "lead", "first_id", "chunks"):
            value = getattr(found, name)
            if type(value) is not int or not 0 <= value < 2**48:
                raise ValueError(f"{name} is {value!r:.80}")
        if not isinstance(found.digest, str) or not re.fullmatch("[0-9a-f]{64}", found.digest):
            raise ValueError(f"digest is {found.digest!r:.80}")
        return found
