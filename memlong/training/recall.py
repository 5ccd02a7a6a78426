"""Texts that only a memory can read: facts among filler, asked for once they have left the local window.

A segment begins with questions and their answers. The questions are what a stream asks its memory for, as when it
generates, and only the answers are trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.evaluation.text import opening_tokens
from memlong.training.config import RECALL
from memlong.training.documents import Episode

_WORD = re.compile(r"[^\W\d_]{5,12}")
_FEWEST_WORDS = 50
_NEEDLES = (
    ("To open the {name}, dial {value}.", "Which number opens the {name}? To open it, dial"),
    ("The {name} was sold for {value} dollars.", "What was the price of the {name}? It was sold for"),
    ("Remember that the {name} has number {value}.", "Which number has the {name}? It has number"),
    ("{value} is the code of the {name}.", "What is the code of the {name}? The code is"),
    ("There are {value} pages about the {name}.", "How many pages are about the {name}? There are"),
)
_REPEATED, _CONTINUED = 24, 24  # tokens
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
        Token ids [tokens] of texts to hide the facts in; names are made of their words.
    tokens
        Length of an episode.
    segment_size, local_window
        Of the memory; a fact is asked for when it has left the window.
    seed
        Random seed.
    questions
        Most questions in a segment; what they retrieve with is all of them together.
    again
        Whether a fact may be asked for more than once, and so be found in its own answer.
    asked_from
        Number of the token from which on segments ask.

    Raises
    ------
    InvalidArgumentError
        If there is no tokenizer, no such kind, or segments are too short for a question and its answer.
    InvalidTextError
        If the filler is too short, or has too few words.
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
        self._filler = torch.cat([each.cpu() for each in filler]).tolist() if filler else []
        if len(self._filler) < segment_size:
            raise InvalidTextError(
                f"The texts to hide facts in must have at least {segment_size} tokens, a segment, got "
                f"{len(self._filler)}: give more text"
            )
        found = _WORD.findall(tokenizer.decode(self._filler[:200_000]))
        self._words = sorted({word.lower() for word in found})
        if len(self._words) < _FEWEST_WORDS:
            raise InvalidTextError(
                f"The texts must have at least {_FEWEST_WORDS} different words of 5 to 12 letters, of which names are "
                f"made, got {len(self._words)}: give more text"
            )
        self._opening, self._line_end = opening_tokens(tokenizer), self._ids("\n")

    def __getitem__(self, number: int) -> Episode:
        """Return the episode with this number, counted from 0 and unbounded."""
        random = np.random.default_rng((self._seed, number))
        told = _MAKERS[self._kind](random, _shuffled(random, self._words))
        text = [*self._opening]
        weights: list[float] = [0.0] * len(text)
        facts: list[_Fact] = []
        place = int(random.integers(len(self._filler)))
        queries: dict[int, list[int]] = {}
        while len(text) < self._tokens:
            start = len(text)
            end = start - start % self._segment + self._segment
            asked: list[_Fact] = []
            if start >= self._asked_from:
                due = self._repeated(text, random) if self._kind == "repeat" else facts
                asked = self._chosen(due, start, random)
            if asked:
                queries[start] = [token for fact in asked for token in fact.question]
            for fact in asked:
                text += [*fact.question, *fact.answer]
                weights += [0.0] * len(fact.question) + [1.0] * len(fact.answer)
                fact.end = len(text)
            if not self._again:
                facts = [fact for fact in facts if fact not in asked]
            if asked:
                text += self._line_end
            body = end - len(text)
            for words, asking, answer in told:
                ids = self._ids(f"\n{words}\n")
                if len(ids) > body:  # it comes in the next segment
                    told = chain([(words, asking, answer)], told)
                    break
                before = int(random.integers(body - len(ids) + 1))
                text += self._hay(place, before) + ids
                place += before
                body -= before + len(ids)
                facts.append(_Fact(*self._asked(asking, answer), len(text)))
                if random.random() < 0.5:
                    break
            text += self._hay(place, body)
            place += body
            weights += [0.0] * (len(text) - len(weights))
        if not any(weights[: self._tokens]):
            raise InvalidArgumentError(
                f"document_tokens and segment_size must leave room for facts of {self._kind!r} and questions that come "
                f"when they have left the local window of {self._window} tokens, got {self._tokens} and {self._segment}"
            )
        kept = slice(self._tokens)
        return Episode(torch.tensor(text[kept]), torch.tensor(weights[kept], dtype=torch.float32), queries)

    def _repeated(self, text: list[int], random: np.random.Generator) -> list[_Fact]:
        """Return a passage of the text to be read again, if one has left the window."""
        latest = len(text) - self._window - _REPEATED - _CONTINUED
        if latest <= len(self._opening):
            return []
        start = int(random.integers(len(self._opening), latest))
        middle = start + _REPEATED
        return [_Fact(text[start:middle], text[middle : middle + _CONTINUED], middle + _CONTINUED)]

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
        if taken + len(self._line_end) > self._segment:
            raise InvalidArgumentError(
                f"segment_size must be at least {taken + len(self._line_end)} for questions and answers of "
                f"{self._kind!r}, got {self._segment}"
            )
        return chosen

    def _hay(self, place: int, count: int) -> list[int]:
        """Return so many tokens of the filler, from a place on."""
        start = place % len(self._filler)
        some = self._filler[start : start + count]
        return some if len(some) == count else some + self._hay(0, count - len(some))

    def _asked(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokenize a question and its answer, which is tokenized as what follows it."""
        ids, both = self._ids("\n" + question), self._ids(f"\n{question} {answer}")
        if both[: len(ids)] != ids:  # the tokenizer joins them
            return ids, self._ids(f" {answer}")
        return ids, both[len(ids) :]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids


def _number(random: np.random.Generator) -> str:
    return str(random.integers(10 ** int(random.integers(2, 6)), 10**6))


def _needles(random: np.random.Generator, words: Iterator[str]) -> Iterator[Made]:
    """Sentences that give a thing a number, in several wordings."""
    while True:
        fact, question = _NEEDLES[int(random.integers(len(_NEEDLES)))]
        name, value = f"{next(words)} {next(words)}", _number(random)
        yield fact.format(name=name, value=value), question.format(name=name), value


def _dictionary(random: np.random.Generator, words: Iterator[str]) -> Iterator[Made]:
    """Entries of a word and one or two others."""
    while True:
        word, value = next(words), " ".join(islice(words, int(random.integers(1, 3))))
        yield f"{word}: {value}", f"{word}:", value


def _passkey(random: np.random.Generator, _words: Iterator[str]) -> Iterator[Made]:
    """A single number, asked for again and again."""
    value = _number(random)
    yield f"The secret number is {value}. Keep it in mind.", "What is the secret number? It is", value


def _variables(random: np.random.Generator, _words: Iterator[str]) -> Iterator[Made]:
    """Assignments of numbers to variables, and of variables to others; the number of each is asked for."""
    known: dict[str, str] = {}
    while True:
        name = "".join(chr(65 + letter) for letter in random.integers(26, size=4).tolist())
        if name in known:
            continue
        other = None
        if known and random.random() < _CHAINED:
            other = list(known)[int(random.integers(len(known)))]
        known[name] = known[other] if other else _number(random)
        yield (
            f"VAR {name} = {f'VAR {other}' if other else known[name]}",
            f"The value of {name} is",
            known[name],
        )


def _nothing(_random: np.random.Generator, _words: Iterator[str]) -> Iterator[Made]:
    """No facts: what is asked for is in the filler."""
    yield from ()


def _shuffled(random: np.random.Generator, words: Sequence[str]) -> Iterator[str]:
    """Yield all words in random order, again and again."""
    while True:
        for place in random.permutation(len(words)).tolist():
            yield words[place]


_MAKERS = dict(zip(RECALL, (_dictionary, _needles, _passkey, _nothing, _variables), strict=True))
