"""Labelled sentences: read from the usual forms of classification files, and drawn for shots and tests."""

from __future__ import annotations

import csv
import io
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.evaluation.text import read_text

_Column = Literal["first", "last"]
_Cells = list[tuple[int, list[str]]]  # line number and cells of each row


@dataclass(frozen=True)
class Example:
    """A text and the word for its label."""

    text: str
    word: str


@dataclass(frozen=True)
class Task:
    """What is shown and what is asked.

    Attributes
    ----------
    words
        The words of the labels, in alphabetical order.
    demonstrations
        To be shown in this order: their first n are n shots, with as many of each word, give or take one.
    tests
        To be asked; no demonstration has the text of one.
    """

    words: tuple[str, ...]
    demonstrations: tuple[Example, ...]
    tests: tuple[Example, ...]

    @property
    def majority(self) -> tuple[str, float]:
        """The tests' most frequent word and its share: the accuracy of who always says it."""
        word, count = Counter(test.word for test in self.tests).most_common(1)[0]
        return word, count / len(self.tests)


def read_examples(
    path: str | Path,
    *,
    labels: Mapping[str, str] | None = None,
    label_column: _Column | None = None,
) -> list[Example]:
    """Read a file of labelled texts: CSV or TSV, with or without a header.

    - Where the first line holds a tab, tabs divide the columns, and quotes are part of the text; elsewhere commas do,
      and a text may stand in quotes.
    - The label stands in the first or the last column, the text in the column next to it. It is the column that holds
      more of the keys of ``labels``, or else fewer different values, or else the last.
    - The first row is a header if its label is no number, no key of ``labels`` and no other row's label.

    Parameters
    ----------
    path
        UTF-8 text.
    labels
        The word for each label; several labels may share one. None where the labels are words themselves.
    label_column
        ``"first"`` or ``"last"``, instead of finding out.

    Raises
    ------
    InvalidTextError
        If the file is missing, empty or no text; or a row has one column, another number of columns than the first
        row, or no text.
    InvalidArgumentError
        If a label is not among ``labels``, or labels are no words and ``labels`` does not say which.
    """
    if label_column not in (None, "first", "last"):
        raise InvalidArgumentError(f"label_column is {label_column!r}; expected 'first' or 'last'.")
    rows = _rows(path)
    known: Mapping[str, str] = labels or {}
    at, beside = (0, 1) if (label_column or _label_column(rows, known)) == "first" else (-1, -2)
    found = [cells[at].strip() for _, cells in rows]
    if len(rows) > 1 and found.count(found[0]) == 1 and found[0] not in known and not _is_number(found[0]):
        rows, found = rows[1:], found[1:]
    words = _words_of(path, found, labels)
    examples = []
    for (line, cells), label in zip(rows, found, strict=True):
        text = cells[beside].strip()
        if not text:
            raise InvalidTextError(f"{str(path)!r} has no text in line {line}. Add it, or remove the line.")
        examples.append(Example(text, words[label]))
    return examples


def draw_task(
    examples: Sequence[Example],
    tests: Sequence[Example] | None = None,
    *,
    shots: int,
    test_limit: int = 200,
    seed: int = 0,
) -> Task:
    """Draw demonstrations, balanced over the words, and tests.

    The same seed draws the same demonstrations, of which fewer shots are the first ones.

    Parameters
    ----------
    examples
        What demonstrations are drawn from.
    tests
        What tests are drawn from, as they come; by default, the examples. Texts that are demonstrations are left out.
    shots
        How many demonstrations.
    test_limit
        How many tests, at most.
    seed
        Of all draws.

    Raises
    ------
    InvalidArgumentError
        If there are fewer than two words, too few examples of one, a test whose word no example has, or no test left.
    """
    if shots < 1 or test_limit < 1:
        raise InvalidArgumentError(
            f"shots is {shots} and test_limit is {test_limit}; expected at least 1 of each."
        )
    words = sorted({example.word for example in examples})
    if len(words) < 2:
        raise InvalidArgumentError(
            f"All {len(examples)} examples have one label, {_listed(words)}; expected two or more to tell apart."
        )
    demonstrations = _balanced(examples, words, shots, seed)
    pool = list(examples if tests is None else tests)
    if strange := sorted({test.word for test in pool} - set(words)):
        raise InvalidArgumentError(
            f"The tests have labels that no demonstration has: {_listed(strange)}; the demonstrations have "
            f"{_listed(words)}. Take both from one task."
        )
    shown = {example.text for example in demonstrations}
    random.Random(seed).shuffle(pool)  # noqa: S311 - nothing here is secret
    left = [test for test in pool if test.text not in shown][:test_limit]
    if not left:
        raise InvalidArgumentError(
            f"All {len(pool)} tests are among the {shots} demonstrations, so none is left to ask. Use fewer shots, or "
            "a file of tests."
        )
    return Task(tuple(words), tuple(demonstrations), tuple(left))


def _balanced(examples: Sequence[Example], words: Sequence[str], shots: int, seed: int) -> list[Example]:
    """Rounds of one example of each word, the words in random order."""
    draws = random.Random(seed)  # noqa: S311
    pools = {word: [example for example in examples if example.word == word] for word in words}
    for pool in pools.values():
        draws.shuffle(pool)
    scarce = min(words, key=lambda word: len(pools[word]))
    most = len(pools[scarce]) * len(words)
    if shots > most:
        raise InvalidArgumentError(
            f"shots is {shots}, but only {len(pools[scarce])} examples are {scarce!r}: with as many of each of the "
            f"{len(words)} labels, expected at most {most}."
        )
    drawn: list[Example] = []
    while len(drawn) < shots:
        turn = len(drawn) // len(words)
        drawn += [pools[word][turn] for word in draws.sample(words, len(words))]
    return drawn[:shots]


def _rows(path: str | Path) -> _Cells:
    text = read_text(path)
    if "\t" in next((line for line in text.split("\n") if line.strip()), ""):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: _Cells = []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((reader.line_num, cells))
    except csv.Error as error:
        if "field limit" in str(error):
            raise InvalidTextError(
                f"{str(path)!r} holds a text of more than {csv.field_size_limit():,} characters that ends in line "
                f"{reader.line_num}: shorten it, or look for a quote that is never closed."
            ) from error
        raise InvalidTextError(
            f"{str(path)!r} is not CSV: {error} (line {reader.line_num}). Put a text that holds quotes into quotes, "
            "and double those within."
        ) from error
    if not rows:
        raise InvalidTextError(f"{str(path)!r} is empty. Give a file with labelled texts in it.")
    columns = len(rows[0][1])
    if columns < 2:
        raise InvalidTextError(
            f"{str(path)!r} has one column; expected a text and its label, with a tab or a comma between them."
        )
    for line, cells in rows:
        if len(cells) != columns:
            raise InvalidTextError(
                f"{str(path)!r} has {len(cells)} columns in line {line}, and {columns} in its first line. Where commas "
                "divide columns, put a text that holds one into quotes."
            )
    return rows


def _label_column(rows: _Cells, known: Mapping[str, str]) -> _Column:
    def likelihood(column: _Column) -> tuple[int, int]:
        values = [cells[0 if column == "first" else -1].strip() for _, cells in rows]
        return sum(value in known for value in values), -len(set(values))

    return "first" if likelihood("first") > likelihood("last") else "last"


def _words_of(path: str | Path, found: Sequence[str], labels: Mapping[str, str] | None) -> Mapping[str, str]:
    different = sorted(set(found))
    if labels is None:
        if not all(any(letter.isalpha() for letter in label) for label in different):
            raise InvalidArgumentError(
                f"{str(path)!r} has the labels {_listed(different)}, which are not all words that a model could say. "
                "Give a word for each, such as --labels 0=negative,1=positive, or say where labels stand with "
                "--label-column first or last."
            )
        return {label: label for label in different}
    if unknown := [label for label in different if label not in labels]:
        raise InvalidArgumentError(
            f"{str(path)!r} has the labels {_listed(different)}, of which {_listed(unknown)} stand for no word: the "
            f"labels known are {_listed(list(labels))}. Give a word for each with --labels, or say where labels stand "
            "with --label-column first or last."
        )
    return labels


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _listed(names: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(repr(name if len(name) <= 40 else f"{name[:40]}…") for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
