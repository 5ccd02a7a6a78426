"""BABILong (arXiv 2406.10149): the facts of a short story hidden among the sentences of a book."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from datasets import Dataset

from memlong.errors import InvalidArgumentError
from memlong.lm_eval.tasks.babi import Question, read_questions
from memlong.lm_eval.tasks.given import ANSWER, Given, given_by, in_turn
from memlong.lm_eval.tasks.haystack import check_length, sentences_of

_TASK = (
    "Between the sentences of a book there are facts about {about}. They stand in the order in which they happened, "
    "and the book does not bear on them. Answer the question at the end from these facts, in one word.{hint}"
)
_LAST = " What happened last counts."


@dataclass(frozen=True)
class Instructions:
    """What a prompt tells of its task.

    Attributes
    ----------
    about
        What the facts are about.
    hint
        How to judge them.
    examples
        Facts with a question, whose names are none of bAbI's.
    """

    about: str
    hint: str
    examples: tuple[Question, ...]

    @property
    def task(self) -> str:
        """Instructions and worked examples."""
        examples = (
            f"Example.\n{' '.join(each.facts)}\nQuestion: {each.text}\nAnswer: {each.answer}"
            for each in self.examples
        )
        return "\n\n".join([_TASK.format(about=self.about, hint=self.hint), *examples])


INSTRUCTIONS = {
    1: Instructions(
        "where people are",
        _LAST,
        (
            Question(
                ("Anna went to the kitchen.", "Peter moved to the garden."), "Where is Anna?", "kitchen"
            ),
            Question(
                ("Peter moved to the office.", "Peter went to the hallway."), "Where is Peter?", "hallway"
            ),
        ),
    ),
    2: Instructions(
        "where people go and what they carry",
        " A thing goes where the person who carries it goes." + _LAST,
        (
            Question(
                ("Anna took the ball there.", "Anna went to the garden."), "Where is the ball?", "garden"
            ),
            Question(
                (
                    "Peter got the cup there.",
                    "Peter went to the office.",
                    "Peter dropped the cup.",
                    "Peter moved to the kitchen.",
                ),
                "Where is the cup?",
                "office",
            ),
        ),
    ),
    3: Instructions(
        "where people go and what they carry",
        " A thing goes where the person who carries it goes.",
        (
            Question(
                (
                    "Anna took the ball there.",
                    "Anna went to the garden.",
                    "Anna moved to the office.",
                    "Anna went to the kitchen.",
                ),
                "Where was the ball before the kitchen?",
                "office",
            ),
        ),
    ),
    4: Instructions(
        "how rooms lie to each other",
        "",
        (
            Question(
                ("The hallway is north of the office.", "The garden is south of the office."),
                "What is north of the office?",
                "hallway",
            ),
            Question(
                ("The kitchen is east of the garden.", "The garden is east of the hallway."),
                "What is the garden east of?",
                "hallway",
            ),
        ),
    ),
    5: Instructions(
        "who gives what to whom",
        _LAST,
        (
            Question(("Anna gave the ball to Peter.",), "Who gave the ball to Peter?", "Anna"),
            Question(
                ("Peter handed the cup to Anna.", "Anna went to the garden."),
                "What did Peter give to Anna?",
                "cup",
            ),
        ),
    ),
}
"""bAbI's tasks, by number."""


@dataclass(frozen=True)
class Book:
    """What facts are hidden in.

    Attributes
    ----------
    sentences
        Its sentences, in order.
    tokens
        Of each sentence.
    """

    sentences: Sequence[str]
    tokens: Sequence[int]

    def passage(self, start: int, tokens: int) -> list[int]:
        """Return which sentences, from one on and from the last to the first, have so many tokens at most."""
        places: list[int] = []
        for step in range(len(self.sentences)):
            place = (start + step) % len(self.sentences)
            tokens -= self.tokens[place]
            if tokens < 0:
                break
            places.append(place)
        return places


def dataset(*, babilong: int, **metadata: Any) -> dict[str, Dataset]:
    """Make the samples of a task, as a task's ``custom_dataset``.

    Parameters
    ----------
    babilong
        A number in `INSTRUCTIONS`.
    **metadata
        ``babi``, a folder with bAbI's files; ``max_seq_lengths``, ``samples`` of each (500, or all questions if these
        are fewer), ``seed`` (0), ``tokenizer`` or ``pretrained``, ``haystack``.

    Raises
    ------
    InvalidArgumentError
        If no question fits into a prompt, or the haystack is shorter than one; or as `given_by` does.
    InvalidTextError, MissingDependencyError
        As `read_questions` and `sentences_of` do.
    """
    given = given_by(metadata)
    questions = read_questions(metadata.get("babi"), babilong)
    candidates = sorted({each.answer for each in questions})
    book = _book(given)
    rows = []
    for length in given.lengths:
        for index, question in enumerate(_chosen(given, babilong, questions, length)):
            rows.append(
                {
                    "index": index,
                    "input": _mixed(
                        given, babilong, question, book, length, given.draw(babilong, length, index)
                    ),
                    "outputs": [question.answer],
                    "question": question.text,
                    "candidates": candidates,
                    "max_length": length,
                }
            )
    return {"test": Dataset.from_list(in_turn(rows), split="test")}


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether the answer is right, under the prompt's length."""
    right = is_right(results[0], doc["question"], doc["outputs"][0], doc["candidates"])
    return {str(doc["max_length"]): float(right)}


def is_right(said: str, question: str, answer: str, candidates: Collection[str]) -> bool:
    """Whether the first sentence names the answer, and none of the others that the question does not name.

    Examples
    --------
    >>> is_right("In the garden.", "Where is Mary?", "garden", ["garden", "kitchen"])
    True
    """
    first = re.split(r"[.\n]", said.strip(), maxsplit=1)[0]
    return _named(first, candidates) - _named(question, candidates) == {answer}


def _named(text: str, candidates: Collection[str]) -> set[str]:
    return {each for each in candidates if re.search(rf"\b{re.escape(each)}\b", text, flags=re.IGNORECASE)}


def _book(given: Given) -> Book:
    sentences = sentences_of(given)
    ids = given.tokenizer(
        [f" {each}" for each in sentences], add_special_tokens=False, verbose=False
    ).input_ids
    book = Book(sentences, [len(each) for each in ids])
    check_length(given, sum(book.tokens))
    return book


def _chosen(given: Given, task: int, questions: Sequence[Question], length: int) -> Iterator[Question]:
    """Yield questions whose facts fit into a prompt: the same of every length, where they do."""
    order = given.draw(task).sample(questions, len(questions))
    left = given.samples
    for question in order:
        if left and given.count(_prompt(task, question, question.facts)) + ANSWER <= length:
            left -= 1
            yield question
    if left == given.samples:
        raise InvalidArgumentError(
            f"No facts of bAbI's task {task} fit into a prompt of {length:,} tokens: take longer max_seq_lengths"
        )


def _mixed(given: Given, task: int, question: Question, book: Book, length: int, draw: Random) -> str:
    """Return a prompt of at most so many tokens with its answer, its facts at random places of a passage."""
    room = length - ANSWER - given.count(_prompt(task, question, question.facts))
    start = draw.randrange(len(book.sentences))
    spots = sorted(draw.random() for _ in question.facts)
    while True:
        places = book.passage(start, room)
        sentences = [book.sentences[place] for place in places]
        for fact, spot in reversed(list(zip(question.facts, spots, strict=True))):
            sentences.insert(int(spot * (len(places) + 1)), fact)
        prompt = _prompt(task, question, sentences)
        over = given.count(prompt) + ANSWER - length
        if over <= 0:
            return prompt
        room -= over  # words that meet can have more tokens than each alone


def _prompt(task: int, question: Question, sentences: Sequence[str]) -> str:
    text = " ".join(sentences)
    return (
        f"{INSTRUCTIONS[task].task}\n\nThe book with the facts:\n{text}\n\nQuestion: {question.text}\nAnswer:"
    )
