"""Texts that only a memory can read: facts among filler, asked for once they have left the local window.

A segment begins with questions and their answers. The questions are what a stream asks its memory for, as when it
generates, and only the answers are trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.evaluation.text import opening_tokens
from memlong.training.config import RECALL
from memlong.training.documents import Episode

_WORD = re.compile(r"(?<![^\W\d_])[^\W\d_]{5,12}(?![^\W\d_])")
_FEWEST_WORDS = 50
_OF_WORDS = ("dictionary", "needles")
_PER_SEGMENT = 2  # facts that a segment tells on average, at most
_ANSWER_WEIGHT = 10.0
"""An answer's token counts as much as so many of text, of which there are many more beside it in a batch."""
_SAMPLE = 100  # facts whose lengths stand for those of all
_NEEDLES = (
    ("To open the {name}, dial {value}.", "Which number opens the {name}? To open it, dial"),
    ("The {name} was sold for {value} dollars.", "What was the price of the {name}? It was sold for"),
    ("Remember that the {name} has number {value}.", "Which number has the {name}? It has number"),
    ("{value} is the code of the {name}.", "What is the code of the {name}? The code is"),
    ("There are {value} pages about the {name}.", "How many pages are about the {name}? There are"),
)
_REPEATED, _CONTINUED = 24, 24  # tokens
_TRIES = 10  # to find a passage that the window does not hold
_ATTEMPTS = 8  # to draw an episode in which something can be asked for
_CHAINED = 0.3  # share of the variables that are assigned another

Made = tuple[str, str, str]
"""The text of a fact, the question, and the answer."""


@dataclass(eq=False)
class _Fact:
    """A fact in the text, as token ids.

    Attributes
    ----------
    question, answer
        Its question, and what follows it.
    end
        Where it was last told: the token after.
    """

    question: list[int]
    answer: list[int]
    end: int


class RecallEpisodes:
    """Generated episodes of one kind, unlimited in number; each follows from the random seed and its number.

    Parameters
    ----------
    kind
        One of `RECALL`.
    tokenizer
        A Hugging Face tokenizer.
    filler
        Token ids [tokens] of texts to hide the facts in; special tokens are left out. Names are made of their words.
    tokens
        Length of an episode.
    segment_size, local_window
        Of the memory; a fact is asked for when it has left the window.
    seed
        Random seed.
    questions
        Most questions in a segment; what they retrieve with is all of them together.
    again
        Whether a fact may be asked for more than once, and so be found in an earlier answer.
    asked_from
        Number of the token from which on segments ask.

    Raises
    ------
    InvalidArgumentError
        If there is no tokenizer, no such kind, segments are too short for a fact or for a question and its answer, or
        episodes are too short to ask.
    InvalidTextError
        If the filler is too short, has too few words, or repeats itself so much that nothing can be asked.
    """

    def __init__(
        self,
        kind: str,
        tokenizer: Any,
        filler: Sequence[Tensor],
        *,
        tokens: int,
        segment_size: int,
        local_window: int,
        seed: int,
        questions: int = 4,
        again: bool = True,
        asked_from: int = 0,
    ) -> None:
        if kind not in RECALL:
            raise InvalidArgumentError(f"kind must be one of {', '.join(map(repr, RECALL))}, got {kind!r}")
        if tokenizer is None:
            raise InvalidArgumentError(
                f"Episodes of {kind!r} are made of words: give the decoder a tokenizer"
            )
        self._kind, self._tokenizer, self._seed = kind, tokenizer, seed
        self._tokens, self._segment, self._window = tokens, segment_size, local_window
        self._questions, self._again, self._asked_from = questions, again, asked_from
        special = set(getattr(tokenizer, "all_special_ids", ()))
        self._filler = [token for each in filler for token in each.tolist() if token not in special]
        # A passage to repeat must not stand in the window again.
        least, what = (tokens, "an episode of 'repeat'") if kind == "repeat" else (segment_size, "a segment")
        if len(self._filler) < least:
            raise InvalidTextError(
                f"The texts to hide facts in must have at least {least} tokens, {what}, got "
                f"{len(self._filler)}: give more text"
            )
        self._words = self._words_of_filler() if kind in _OF_WORDS else []
        self._opening, self._line_end = opening_tokens(tokenizer), self._ids("\n")
        self._check_lengths()

    def __getitem__(self, number: int) -> Episode:
        """Return the episode with this number, counted from 0 and unbounded."""
        for attempt in range(_ATTEMPTS):
            drawn = (self._seed, number, attempt) if attempt else (self._seed, number)
            episode = self._episode(np.random.default_rng(drawn))
            if episode.weights is not None and episode.weights.any():
                return episode
        raise InvalidTextError(
            f"The texts must leave something to ask for in an episode of {self._kind!r}, got ones that repeat "
            "themselves within the local window: give other text"
        )

    def _episode(self, random: np.random.Generator) -> Episode:
        """Draw an episode, in which there may be nothing to ask for."""
        told = _MAKERS[self._kind](random, self._words)
        pending: Made | None = None  # it did not fit into the segment before
        text = [*self._opening]
        weights: list[float] = [0.0] * len(text)
        facts: list[_Fact] = []
        place = int(random.integers(len(self._filler)))
        queries: dict[int, list[int]] = {}
        places: dict[int, list[int]] = {}
        while len(text) < self._tokens:
            start = len(text)
            end = start - start % self._segment + self._segment
            asked: list[_Fact] = []
            if start >= self._asked_from:
                due = self._repeated(text, random) if self._kind == "repeat" else facts
                asked = self._chosen(due, start, random)
            if asked:
                queries[start] = [token for fact in asked for token in fact.question]
                places[start] = [fact.end for fact in asked]
            for fact in asked:
                text += [*fact.question, *fact.answer]
                weights += [0.0] * len(fact.question) + [_ANSWER_WEIGHT] * len(fact.answer)
                fact.end = len(text)
            if not self._again:
                facts = [fact for fact in facts if fact not in asked]
            if asked:
                text += self._line_end
            body = end - len(text)
            while (made := pending or next(told, None)) is not None:
                pending = None
                ids, fact = self._tokenized(made)
                if self._is_too_long(ids, fact):
                    continue
                if len(ids) > body:
                    pending = made
                    break
                before = int(random.integers(body - len(ids) + 1))
                text += self._hay(place, before) + ids
                place += before
                body -= before + len(ids)
                fact.end = len(text)
                facts.append(fact)
                if random.random() < 0.5:
                    break
            text += self._hay(place, body)
            place += body
            weights += [0.0] * (len(text) - len(weights))
        kept = slice(self._tokens)
        of_loss = torch.tensor(weights[kept], dtype=torch.float32)
        return Episode(torch.tensor(text[kept]), of_loss, queries, places)

    def _repeated(self, text: list[int], random: np.random.Generator) -> list[_Fact]:
        """Return a passage of the text to be read again, if one has left the window and does not stand in it."""
        latest = len(text) - self._window - _REPEATED - _CONTINUED
        if latest <= len(self._opening):
            return []
        window = text[-self._window :]
        for _ in range(_TRIES):
            start = int(random.integers(len(self._opening), latest))
            middle = start + _REPEATED
            passage = text[start:middle]
            if not _holds(window, passage):
                return [_Fact(passage, text[middle : middle + _CONTINUED], middle + _CONTINUED)]
        return []

    def _chosen(self, facts: Sequence[_Fact], start: int, random: np.random.Generator) -> list[_Fact]:
        """Choose facts that have left the window: one, or more that fit into half a segment with their questions."""
        due = [fact for fact in facts if fact.end <= start - self._window]
        chosen: list[_Fact] = []
        taken = 0
        for place in random.permutation(len(due))[: self._questions].tolist():
            size = len(due[place].question) + len(due[place].answer)
            if chosen and taken + size > self._segment // 2:
                break
            chosen.append(due[place])
            taken += size
        return chosen

    def _words_of_filler(self) -> list[str]:
        found = _WORD.findall(self._tokenizer.decode(self._filler[:200_000]))
        words = sorted({word.lower() for word in found})
        # Each entry of a dictionary has a word of its own; there are many more pairs of words.
        entries = _PER_SEGMENT * -(-self._tokens // self._segment) if self._kind == "dictionary" else 0
        fewest = max(_FEWEST_WORDS, entries)
        if len(words) < fewest:
            raise InvalidTextError(
                f"The texts must have at least {fewest} different words of 5 to 12 letters for the names of "
                f"{self._kind!r}, got {len(words)}: give more text"
            )
        return words

    def _check_lengths(self) -> None:
        """Refuse sizes with which an episode could not tell a fact, or not ask for it."""
        random = np.random.default_rng(self._seed)
        made = islice(_MAKERS[self._kind](random, self._words), _SAMPLE)
        sample = [self._tokenized(each) for each in made]
        longest = max((self._needed(*each) for each in sample), default=self._repeated_size())
        if longest > self._segment:
            raise InvalidArgumentError(
                f"segment_size must be at least {longest} tokens for a fact of {self._kind!r}, or a question and its "
                f"answer, got {self._segment}"
            )
        start = first_asking(self._segment, self._window)
        if self._asked_from > start:
            start = -(-self._asked_from // self._segment) * self._segment
        if self._tokens < start + longest:
            raise InvalidArgumentError(
                f"document_tokens must be at least {start + longest} to ask for a fact of {self._kind!r} once it has "
                f"left the local window of {self._window} tokens, got {self._tokens}"
            )

    def _repeated_size(self) -> int:
        """Return how long a segment must be to hold a passage that can be repeated, or to repeat one."""
        return len(self._opening) + _REPEATED + _CONTINUED + max(1, len(self._line_end))

    def _needed(self, ids: Sequence[int], fact: _Fact) -> int:
        """Return how long a segment must be to tell a fact, after the opening, and to ask for it."""
        asked = len(fact.question) + len(fact.answer) + len(self._line_end)
        return max(len(self._opening) + len(ids), asked)

    def _is_too_long(self, ids: Sequence[int], fact: _Fact) -> bool:
        return self._needed(ids, fact) > self._segment

    def _tokenized(self, made: Made) -> tuple[list[int], _Fact]:
        """Tokenize the text of a fact, its question and its answer; it is not told yet."""
        words, asking, answer = made
        return self._ids(f"\n{words}\n"), _Fact(*tokenize_asked(self._tokenizer, asking, answer), 0)

    def _hay(self, place: int, count: int) -> list[int]:
        """Return so many tokens of the filler, from a place on."""
        start = place % len(self._filler)
        some = self._filler[start : start + count]
        return some if len(some) == count else some + self._hay(0, count - len(some))

    def _ids(self, text: str) -> list[int]:
        return _ids(self._tokenizer, text)


def tokenize_asked(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the token ids of a question, on a line of its own, and of its answer, as what follows it."""
    ids, both = _ids(tokenizer, f"\n{question}"), _ids(tokenizer, f"\n{question} {answer}")
    if both[: len(ids)] != ids:  # the tokenizer joins them
        return ids, _ids(tokenizer, f" {answer}")
    return ids, both[len(ids) :]


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def first_asking(segment_size: int, local_window: int) -> int:
    """Return the token from which on an episode can ask: where what the first segment tells has left the window."""
    return -(-(segment_size + local_window) // segment_size) * segment_size


def _holds(text: Sequence[int], passage: Sequence[int]) -> bool:
    size = len(passage)
    return any(text[start : start + size] == passage for start in range(len(text) - size + 1))


def _number(random: np.random.Generator) -> str:
    """Return a number of three to six digits, each as often."""
    least = 10 ** int(random.integers(2, 6))
    return str(random.integers(least, 10 * least))


def _needles(random: np.random.Generator, words: Sequence[str]) -> Iterator[Made]:
    """Sentences that give a thing a number, in several wordings."""
    drawn = _shuffled(random, words)
    known: set[str] = set()
    while len(known) < len(words) ** 2 // 2:
        fact, question = _NEEDLES[int(random.integers(len(_NEEDLES)))]
        name, value = f"{next(drawn)} {next(drawn)}", _number(random)
        if name in known:
            continue
        known.add(name)
        yield fact.format(name=name, value=value), question.format(name=name), value


def _dictionary(random: np.random.Generator, words: Sequence[str]) -> Iterator[Made]:
    """Entries of a word and one or two others, until each word has one."""
    drawn = _shuffled(random, words)
    known: set[str] = set()
    while len(known) < len(words):
        word, value = next(drawn), " ".join(islice(drawn, int(random.integers(1, 3))))
        if word in known:
            continue
        known.add(word)
        yield f"{word}: {value}", f"{word}:", value


def _passkey(random: np.random.Generator, _words: Sequence[str]) -> Iterator[Made]:
    """A single number, asked for again and again."""
    value = _number(random)
    yield f"The secret number is {value}. Keep it in mind.", "What is the secret number? It is", value


def _variables(random: np.random.Generator, _words: Sequence[str]) -> Iterator[Made]:
    """Assignments of numbers to variables, and of variables to others, whose number is a second question."""
    known: list[str] = []
    while True:
        name = "".join(chr(65 + letter) for letter in random.integers(26, size=4).tolist())
        if name in known:
            continue
        if known and random.random() < _CHAINED:
            value = f"VAR {known[int(random.integers(len(known)))]}"
        else:
            value = _number(random)
        known.append(name)
        yield f"VAR {name} = {value}", f"The value of {name} is", value


def _nothing(_random: np.random.Generator, _words: Sequence[str]) -> Iterator[Made]:
    """No facts: what is asked for is in the filler."""
    yield from ()


def _shuffled(random: np.random.Generator, words: Sequence[str]) -> Iterator[str]:
    """Yield all words in random order, again and again."""
    while True:
        for place in random.permutation(len(words)).tolist():
            yield words[place]


_MAKERS = dict(zip(RECALL, (_dictionary, _needles, _passkey, _nothing, _variables), strict=True))
