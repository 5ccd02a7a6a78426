"""Questions on documents, read from the files of SQuAD (arXiv 1806.03822) and HotpotQA (arXiv 1809.09600)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.evaluation import read_text
from memlong.lm_eval.tasks.given import Given


@dataclass(frozen=True)
class Documents:
    """Questions and documents, as lm-eval's generator takes them.

    Attributes
    ----------
    questions
        Each with its ``query``, right answers (``outputs``), where in ``texts`` its documents are (``context``), and
        perhaps those that fill a prompt first (``more_context``).
    texts
        All documents, sorted.
    """

    questions: Sequence[dict[str, Any]]
    texts: Sequence[str]


@dataclass(frozen=True)
class Source:
    """Where a task has its questions from.

    Attributes
    ----------
    key
        What the metadata calls its file.
    parse
        What turns the content of that into `Documents`.
    known
        Files that there are.
    """

    key: str
    parse: Callable[[Any], Documents]
    known: str


def read_documents(source: Source, path: str | None, given: Given) -> Documents:
    """Read documents, which must fill the longest prompt, and the questions that have an answer.

    Raises
    ------
    InvalidArgumentError
        If no file is named, or its documents are too few.
    InvalidTextError
        If it cannot be read, is in another format, or has no such question.
    """
    known = f"{source.known} in the metadata {source.key!r}"
    if not path:
        raise InvalidArgumentError(
            f"This task asks questions on documents, and no file with them is named: name {known}"
        )
    try:
        found = source.parse(json.loads(read_text(path)))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidTextError(
            f"{path!r} is not in the expected format ({type(error).__name__}: {error}): name {known}"
        ) from error
    answered = [
        {**each, "outputs": [answer for answer in each["outputs"] if answer.strip()]}
        for each in found.questions
    ]
    asked = [each for each in answered if each["outputs"]]
    if not asked:
        raise InvalidTextError(f"{path!r} has no question with an answer: name {known}")
    _check_length(found.texts, path, given)
    return replace(found, questions=asked)


def _check_length(texts: Sequence[str], path: str, given: Given) -> None:
    longest, tokens = max(given.lengths), 0
    for text in texts:  # until there are enough, as there may be millions
        tokens += given.count(text)
        if tokens >= longest:
            return
    raise InvalidArgumentError(
        f"The documents of {path!r} have {tokens:,} tokens, too few to fill a prompt of {longest:,}: name a file with "
        "more, or take shorter max_seq_lengths"
    )


def _squad(found: Any) -> Documents:
    articles = [
        [(_string(each["context"]), each["qas"]) for each in article["paragraphs"]]
        for article in found["data"]
    ]
    texts = sorted({text for article in articles for text, _ in article})
    places = {text: place for place, text in enumerate(texts)}
    questions = []
    for article in articles:
        here = [places[text] for text, _ in article]
        for (_, asked), own in zip(article, here, strict=True):
            others = [place for place in here if place != own]
            questions += [
                {
                    "query": _string(each["question"]),
                    "outputs": [_string(answer["text"]) for answer in each["answers"]],
                    "context": [own],
                    "more_context": others,
                }
                for each in asked
                if not each.get("is_impossible")
            ]
    return Documents(questions, texts)


def _hotpotqa(found: Any) -> Documents:
    contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in _parts(each)] for each in found]
    texts = sorted({text for context in contexts for text in context})
    places = {text: place for place, text in enumerate(texts)}
    questions = [
        {
            "query": _string(each["question"]),
            "outputs": [_string(each["answer"])],
            "context": [places[text] for text in context],
        }
        for each, context in zip(found, contexts, strict=True)
    ]
    return Documents(questions, texts)


def _parts(question: Any) -> list[Any]:
    """Return titles and sentences of a question's documents, in the form of the file or of the data set on the hub."""
    context = question["context"]
    if isinstance(context, dict):
        return list(zip(context["title"], context["sentences"], strict=True))
    return list(context)


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r:.40}")
    return value


SOURCES = {
    "qa_1": Source("squad", _squad, "SQuAD's dev-v2.0.json or one in its format, such as xquad.en.json,"),
    "qa_2": Source("hotpotqa", _hotpotqa, "HotpotQA's hotpot_dev_distractor_v1.json"),
}
"""RULER's tasks on documents."""
