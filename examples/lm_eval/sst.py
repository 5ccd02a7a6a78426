"""SST-2 and SST-5 from files of your own, with few-shot examples that are the same for every test.

SST-2 files have a text and a label (0 or 1) in each line, separated by a tab; SST-5 files have a label (0 to 4) and a
text, separated by a comma. The first line may be a header. Without a file of tests, a fifth of the others is held out.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from datasets import Dataset

Lines = list[list[str]]
KNOWN = ("sst2_train", "sst2_test", "sst5_train", "sst5_test")


def sst2(sst2_train: str | None = None, sst2_test: str | None = None, **others: Any) -> dict[str, Dataset]:
    """Return the splits of SST-2; lm-eval passes what ``--metadata`` names."""
    _refuse_misspelled(others)
    return _splits(_tabbed, 2, _given("sst2_train", sst2_train, sst2_test))


def sst5(sst5_train: str | None = None, sst5_test: str | None = None, **others: Any) -> dict[str, Dataset]:
    """Return the splits of SST-5; lm-eval passes what ``--metadata`` names."""
    _refuse_misspelled(others)
    return _splits(_quoted, 5, _given("sst5_train", sst5_train, sst5_test))


def _refuse_misspelled(keys: Iterable[str]) -> None:
    """Refuse what is nearly a known key; others may be those of other tasks or arguments of the model."""
    for key in keys:
        if key not in KNOWN and (near := get_close_matches(key, KNOWN, n=1, cutoff=0.7)):
            raise ValueError(
                f"The metadata has {key!r}, which no task looks for: did you mean {near[0]!r}? Tasks look for "
                f"{', '.join(KNOWN)}"
            )


def _given(name: str, train: str | None, test: str | None) -> list[str]:
    if train is None:
        raise ValueError(f'{name} is missing: name your file, as in --metadata \'{{"{name}": "train.txt"}}\'')
    return [train] if test is None else [train, test]


def _tabbed(path: str) -> Lines:
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        return [line[::-1] for line in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def _quoted(path: str) -> Lines:
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file))


def _rows(path: str, lines: Lines, labels: int) -> list[dict[str, Any]]:
    """Make rows of lines that are a label and a text; a first one without a label is a header."""
    known = [str(label) for label in range(labels)]
    rows = []
    for number, line in enumerate(lines, 1):
        if len(line) == 2 and line[0].strip() in known:
            rows.append({"text": line[1].strip(), "label": int(line[0])})
        elif line and number > 1:
            raise ValueError(
                f"{path!r} must have a text and a label from 0 to {labels - 1} in every row, got {line} in row "
                f"{number}: correct it, or remove the row"
            )
    return rows


def _splits(read: Callable[[str], Lines], labels: int, paths: list[str]) -> dict[str, Dataset]:
    """Shuffle tests, and order the rest so that any number of shots is balanced and begins with fewer shots."""
    draw = random.Random(0)  # noqa: S311 - not for cryptography
    train, *tests = (_rows(path, read(path), labels) for path in paths)
    draw.shuffle(train)
    if tests:
        (test,) = tests
        draw.shuffle(test)
    else:
        held_out = len(train) // 5
        train, test = train[held_out:], train[:held_out]
    asked = {row["text"] for row in test}
    known = {row["text"]: row for row in train if row["text"] not in asked}.values()
    by_label = [[row for row in known if row["label"] == label] for label in range(labels)]
    ordered = [row for each in zip(*by_label, strict=False) for row in draw.sample(each, labels)]
    if not (ordered and test):
        raise ValueError(
            f"{' and '.join(paths)} must have examples of all {labels} labels, and tests: give more rows"
        )
    return {"train": Dataset.from_list(ordered), "test": Dataset.from_list(test)}
