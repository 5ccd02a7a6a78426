"""Labeled texts: read them from CSV and TSV files, and draw demonstrations and tests."""

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
    """A text and its label word."""

    text: str
    word: str


@dataclass(frozen=True)
class Task:
    """The demonstrations and tests of an in-context learning task.

    Attributes
    ----------
    words
        The label words, in alphabetical order.
    demonstrations
        In order: the first n are n shots, balanced over the words to within one.
    tests
        Test examples; none has the text of a demonstration.
    """

    words: tuple[str, ...]
    demonstrations: tuple[Example, ...]
    tests: tuple[Example, ...]

    @property
    def majority(self) -> tuple[str, float]:
        """The tests' most frequent word and its share: the accuracy of the majority baseline."""
        word, count = Counter(test.word for test in self.tests).most_common(1)[0]
        return word, count / len(self.tests)


def read_examples(
    path: str | Path,
    *,
    labels: Mapping[str, str] | None = None,
    label_column: _Column | None = None,
) -> list[Example]:
    """Read labeled texts from a CSV or TSV file, with or without a header.

    - If the first line has a tab, columns are separated by tabs, and quotes are part of the text; otherwise by commas,
      and texts may be quoted.
    - The label is in the first or last column, and the text in the column next to it. The label column is the one with
      more keys of ``labels``, else the one with fewer distinct values, else the last.
    - The first row is a header if its label is not a number, not a key of ``labels`` and not the label of another row.

    Parameters
    ----------
    path
        UTF-8 text file.
    labels
        The word for each label; several labels may share one. None if the labels are words.
    label_column
        ``"first"`` or ``"last"``; detected by default.

    Raises
    ------
    InvalidTextError
        If the file is missing, empty or not text, or a row has a single column, a different number of columns than the
        first row, or no text.
    InvalidArgumentError
        If a label is not in ``labels``, or labels are not words and ``labels`` is None.
    """
    if label_column not in (None, "first", "last"):
        raise InvalidArgumentError(f"label_column must be 'first' or 'last', got {label_column!r}")
    rows = _rows(path)
    known: Mapping[str, str] = labels or {}
    label_at, text_at = (0, 1) if (label_column or _label_column(rows, known)) == "first" else (-1, -2)
    found = [cells[label_at].strip() for _, cells in rows]
    if len(rows) > 1 and found.count(found[0]) == 1 and found[0] not in known and not _is_number(found[0]):
        rows, found = rows[1:], found[1:]
    words = _words_of(path, found, labels)
    examples = []
    for (line, cells), label in zip(rows, found, strict=True):
        text = cells[text_at].strip()
        if not text:
            raise InvalidTextError(f"{str(path)!r} has no text in line {line}: add it, or remove the line")
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
    """Draw balanced demonstrations, and tests.

    With the same seed, fewer shots are a prefix of more shots.

    Parameters
    ----------
    examples
        Examples to draw demonstrations from.
    tests
        Examples to draw tests from, unbalanced; ``examples`` by default. Texts of demonstrations are excluded.
    shots
        Number of demonstrations.
    test_limit
        Maximum number of tests.
    seed
        Random seed.

    Raises
    ------
    InvalidArgumentError
        If there are fewer than two words, too few examples of one, a test with an unknown word, or no tests left.
    """
    if shots < 1 or test_limit < 1:
        raise InvalidArgumentError(f"shots and test_limit must be at least 1, got {shots} and {test_limit}")
    words = sorted({example.word for example in examples})
    if len(words) < 2:
        raise InvalidArgumentError(
            f"examples must have at least two labels, got one for all {len(examples)}: {_listed(words)}"
        )
    demonstrations = _balanced(examples, words, shots, seed)
    pool = list(examples if tests is None else tests)
    if strange := sorted({test.word for test in pool} - set(words)):
        raise InvalidArgumentError(
            f"tests must have labels of the demonstrations ({_listed(words)}), got {_listed(strange)}: use files of "
            "one task"
        )
    shown = {example.text for example in demonstrations}
    random.Random(seed).shuffle(pool)  # noqa: S311 - not for cryptography
    left = [test for test in pool if test.text not in shown][:test_limit]
    if not left:
        raise InvalidArgumentError(
            f"No tests are left, as all {len(pool)} are among the {shots} demonstrations: use fewer shots, or a "
            "separate file of tests"
        )
    return Task(tuple(words), tuple(demonstrations), tuple(left))


def _balanced(examples: Sequence[Example], words: Sequence[str], shots: int, seed: int) -> list[Example]:
    """Draw rounds of one example per word, the words in random order."""
    draws = random.Random(seed)  # noqa: S311
    pools = {word: [example for example in examples if example.word == word] for word in words}
    for pool in pools.values():
        draws.shuffle(pool)
    scarce = min(words, key=lambda word: len(pools[word]))
    most = len(pools[scarce]) * len(words)
    if shots > most:
        raise InvalidArgumentError(
            f"shots must be at most {most}, with {len(words)} balanced labels and only {len(pools[scarce])} examples "
            f"of {scarce!r}, got {shots}"
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
                f"{str(path)!r} has a text of more than {csv.field_size_limit():,} characters, up to line "
                f"{reader.line_num}: shorten it, or close an open quote"
            ) from error
        raise InvalidTextError(
            f"{str(path)!r} is not valid CSV: {error} (line {reader.line_num}). Quote texts that contain quotes, and "
            "double the inner ones"
        ) from error
    if not rows:
        raise InvalidTextError(f"{str(path)!r} is empty: give a file with labeled texts")
    columns = len(rows[0][1])
    if columns < 2:
        raise InvalidTextError(
            f"{str(path)!r} must have a text and a label per row, separated by a tab or comma, got one column"
        )
    for line, cells in rows:
        if len(cells) != columns:
            raise InvalidTextError(
                f"{str(path)!r} must have {columns} columns in every row, as in its first, got {len(cells)} in line "
                f"{line}. In CSV, quote texts that contain commas"
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
                f"The labels in {str(path)!r} must be words, got {_listed(different)}. Give a word for each, such as "
                "--labels 0=negative,1=positive, or set the column of the labels: --label-column first or last"
            )
        return {label: label for label in different}
    if unknown := [label for label in different if label not in labels]:
        raise InvalidArgumentError(
            f"The labels in {str(path)!r} must be among {_listed(list(labels))}, got {_listed(unknown)}. Give a word "
            "for each with --labels, or set the column of the labels: --label-column first or last"
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
