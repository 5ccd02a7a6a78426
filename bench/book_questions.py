"""Questions that a book answers word for word: cues to continue, made from its sentences.

A cue is a sentence, or its beginning, that stands once in all books. Three kinds:

- *next line*: the first words of the sentence that follows;
- *number*: the number that follows in the sentence, in digits or a word;
- *name*: the proper name that follows, which the cue does not have.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from random import Random

KINDS = ("next line", "number", "name")
_LINE = 6  # words of a next line that count
_CUE = range(9, 41)  # words
_TAIL = 8  # last words of a cue, which stand once
_NEAR = 700  # characters before and after a cue that make its passage
_QUOTES = "\u201c\u201d\u2018\u2019"
_MARKS = string.punctuation + _QUOTES + "\u2026"
_SENTENCE = re.compile(rf"(?<=[.!?])[\"{_QUOTES})]*\s+(?=[\"{_QUOTES}(]*[A-Z])")
_ABBREVIATION = re.compile(rf"\b(Mr|Mrs|Ms|Dr|St|Capt|Gen|Gov|No|Jr|Sr|U\.S|[A-Z])\.[\"{_QUOTES})]*$")
_DIGITS = re.compile(r"[$£]?\d[\d,.]*")
_NUMBERS = frozenset(
    """
    two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion trillion
    """.split()  # noqa: SIM905 - thirty lines otherwise
)
_BETWEEN = re.compile("[\\s\u2014\u2013]+|--+")
_POSSESSIVE = re.compile("['\u2019]s$")
_NAME = re.compile(r"[A-Z][a-z]{2,}$")


@dataclass(frozen=True)
class Question:
    """A cue from a book, and what follows.

    Attributes
    ----------
    book
        The book's name.
    kind
        One of `KINDS`.
    cue
        Text to continue.
    answer
        The words that must follow.
    passage
        The text around the cue, which has the answer.
    """

    book: str
    kind: str
    cue: str
    answer: str
    passage: str

    def is_answered_by(self, said: str) -> bool:
        """Whether a continuation begins with the answer, but for case and for marks around words."""
        wanted = words(self.answer)
        return words(said)[: len(wanted)] == wanted


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case, without the marks around them and without a possessive s."""
    stripped = (each.strip(_MARKS) for each in _BETWEEN.split(text))
    return [_POSSESSIVE.sub("", each).casefold() for each in stripped if each]


def questions(books: Mapping[str, str], count: int, *, seed: int = 0, skip: int = 0) -> list[Question]:
    """Draw so many questions for each book, in equal parts of each kind, the first kinds one more where it matters.

    Parameters
    ----------
    books
        Texts, by name.
    count
        Questions for each book.
    seed
        Random seed.
    skip
        Leave out the first so many questions of each book and kind: these are another set, with no sentence in common.
    """
    whole = " ".join(" ".join(text.split()) for text in books.values())
    known = frozenset(re.findall(r"\b[a-z]+\b", whole))
    found: list[Question] = []
    for book, text in books.items():
        candidates = list(_candidates(book, text, known))
        Random(seed).shuffle(candidates)  # noqa: S311 - not for cryptography
        of_sentences: dict[str, Question] = {}
        for each in candidates:  # one question of a sentence, whatever else is drawn
            of_sentences.setdefault(each.passage, each)
        for number, kind in enumerate(KINDS):
            wanted = count // len(KINDS) + (number < count % len(KINDS))
            mine = (each for each in of_sentences.values() if each.kind == kind)
            unique = (each for each in mine if whole.count(" ".join(each.cue.split()[-_TAIL:])) == 1)
            found += islice(unique, skip, skip + wanted)
    return found


def _candidates(book: str, text: str, known: frozenset[str]) -> Iterator[Question]:
    for paragraph in re.split(r"\n\s*\n", text):
        flat = " ".join(paragraph.split())
        sentences = list(_sentences(flat))
        if len(sentences) < 3 or "(" in flat[:1]:  # a title, or a stage direction
            continue
        for (start, end), (then, last) in pairwise(sentences):
            passage = flat[max(0, start - _NEAR) : last + _NEAR]
            yield from _of_sentence(book, flat[start:end], flat[then:last], passage, known)


def _of_sentence(
    book: str, sentence: str, following: str, passage: str, known: frozenset[str]
) -> Iterator[Question]:
    """Yield at most one question of each kind."""
    if re.search(r"[()\[\]]", sentence + following):
        return
    tokens, after = sentence.split(), following.split()
    if len(tokens) in _CUE and len(words(following)) > _LINE:
        yield Question(book, "next line", sentence, " ".join(after[:_LINE]), passage)
    has = {"number": False, "name": False}
    of_tokens = [words(token) for token in tokens[: _CUE.stop]]
    for place in range(_CUE.start, len(of_tokens)):
        cue, token = " ".join(tokens[:place]), tokens[place]
        if len(of_tokens[place]) != 1 or any(of_tokens[place][0] in each for each in of_tokens[:place]):
            continue
        (bare,) = of_tokens[place]
        stripped = _POSSESSIVE.sub("", token.strip(_MARKS))
        is_number = _DIGITS.fullmatch(token.strip(_QUOTES + '".,;:!?%')) is not None
        is_number |= bool(set(bare.split("-")) & _NUMBERS) and set(bare.split("-")) <= _NUMBERS | {"one"}
        before = tokens[place - 1]
        is_name = (
            _NAME.fullmatch(stripped) is not None
            and bare not in known
            and before[-1:].isalpha()
            and before.islower()
        )
        for kind, fits in (("number", is_number), ("name", is_name)):
            if fits and not has[kind]:
                has[kind] = True
                yield Question(book, kind, cue, stripped, passage)


def _sentences(paragraph: str) -> Iterator[tuple[int, int]]:
    """Yield where sentences begin and end."""
    start = 0
    for mark in _SENTENCE.finditer(paragraph):
        if not _ABBREVIATION.search(paragraph[start : mark.end()].rstrip()):
            yield start, mark.start() + len(mark.group().rstrip())
            start = mark.end()
    if start < len(paragraph):
        yield start, len(paragraph)


def shares(found: Sequence[Question]) -> dict[str, int]:
    """Return how many questions there are of each kind."""
    return {kind: sum(each.kind == kind for each in found) for kind in KINDS}
