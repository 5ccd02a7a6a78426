"""Facts that differ only in whom they are about: hard-needle, among its own sentences or those of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from datasets import Dataset

from memlong.bank.validate import whole_number
from memlong.errors import InvalidArgumentError, MissingDependencyError
from memlong.evaluation.needle import says
from memlong.lm_eval.tasks.given import ANSWER, Given, given_by, in_turn
from memlong.lm_eval.tasks.haystack import check_length, sentences_of

_NEEDLES = 6
_GENEROUS = 8  # characters of a token, more than it has


@dataclass(frozen=True)
class Sentences:
    """A text as hard-needle asks for one."""

    all: Sequence[str]

    def sample(self, count: int, draw: Random) -> list[str]:
        """Return so many sentences, of any part of the text."""
        return draw.choices(self.all, k=count)


def dataset(**metadata: Any) -> dict[str, Dataset]:
    """Make the samples, as a task's ``custom_dataset``.

    Parameters
    ----------
    **metadata
        ``needles``, facts of a prompt (6); ``max_seq_lengths``, ``samples`` of each (500), ``seed`` (0), ``tokenizer``
        or ``pretrained``; ``haystack``, a text file or a folder of such instead of hard-needle's own sentences.

    Raises
    ------
    InvalidArgumentError
        If there are not so many needles, or the haystack is shorter than a prompt; or as `given_by` does.
    InvalidTextError, MissingDependencyError
        As `sentences_of` does, or if hard-needle is not installed.
    """
    given = given_by(metadata)
    needles = whole_number("needles", metadata.get("needles", _NEEDLES), at_least=2)
    book = None if given.haystack is None else _book(given)
    rows = []
    for length in given.lengths:
        for index in range(given.samples):
            seed = given.draw("hard_needle", index).getrandbits(32)  # the same facts at all lengths
            made = _fitting(given, length, {"num_needles": needles, "distractors": book, "seed": seed})
            values = [record["value"] for record in made["needle_records"]]
            rows.append(
                {
                    "index": index,
                    "input": made["prompt"],
                    "outputs": [made["target"]],
                    "choices": values,
                    "gold": values.index(made["target"]),
                    "max_length": length,
                }
            )
    return {"test": Dataset.from_list(in_turn(rows), split="test")}


def _book(given: Given) -> Sentences:
    sentences = sentences_of(given)
    check_length(given, given.count(" ".join(sentences)))
    return Sentences(sentences)


def is_said(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether the answer begins with what was asked for, under the prompt's length."""
    return {str(doc["max_length"]): float(says(results[0], doc["outputs"][0]))}


def is_chosen(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return whether what was asked for is the likeliest by byte of the prompt's values, under the prompt's length."""
    likelihoods = [
        likelihood / len(value.encode())
        for (likelihood, _), value in zip(results, doc["choices"], strict=True)
    ]
    return {str(doc["max_length"]): float(likelihoods.index(max(likelihoods)) == doc["gold"])}


def _fitting(given: Given, length: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return an example whose prompt has so many tokens at most with its answer, and hardly fewer."""
    try:
        from hard_needle import generate_hard_example
    except ImportError as error:
        raise MissingDependencyError(
            f"This task needs hard-needle ({error}): pip install hard-needle"
        ) from error
    characters = _GENEROUS * length
    while True:
        try:
            made: dict[str, Any] = generate_hard_example(ctx_chars=characters, **options)
        except ValueError as error:
            raise InvalidArgumentError(f"Cannot make a prompt of hard-needle: {error}") from error
        tokens = given.count(made["prompt"]) + ANSWER
        if tokens <= length:
            return made
        characters = int(characters * min(length / tokens, 0.999))
