"""RULER's questions on documents, read from the files of SQuAD (arXiv 1806.03822) and HotpotQA (arXiv 1809.09600)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from datasets import Dataset
from lm_eval.tasks.ruler import common_utils
from lm_eval.tasks.ruler.qa_utils import CONFIG, DOCUMENT_PROMPT, TEMPLATE
from tqdm import tqdm

from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.evaluation import read_text
from memlong.lm_eval.tasks.given import Given, given_by, in_turn

_ANSWER: int = CONFIG["tokens_to_generate"]
_PREFIX: str = CONFIG["answer_prefix"]
_WRONG = (LookupError, TypeError, ValueError, AttributeError)  # what content of another form leads to


@dataclass(frozen=True)
class Question:
    """A question with an answer.

    Attributes
    ----------
    text
        The question.
    answers
        Its right answers, any of which will do.
    documents
        What it is about.
    near
        Documents of the same article, which fill a prompt before others do.
    """

    text: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    near: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Where the questions of a task come from.

    Attributes
    ----------
    key
        What the metadata calls its file.
    parts
        Returns the articles or questions of the file, or raises TypeError.
    parse
        Returns the documents and the questions of one of them.
    known
        Files that work.
    """

    key: str
    parts: Callable[[Any], Sequence[Any]]
    parse: Callable[[Any], tuple[Sequence[str], Sequence[Question]]]
    known: str


def dataset(*, ruler: str, **metadata: Any) -> dict[str, Dataset]:
    """Make the samples of a task, as a task's ``custom_dataset``.

    A prompt holds the documents of its question and as many others as fit, in random order. Questions are the same at
    all lengths, and longer prompts hold the documents of shorter ones.

    Parameters
    ----------
    ruler
        A name in `SOURCES`.
    **metadata
        ``squad`` or ``hotpotqa``, a file; ``max_seq_lengths``, ``samples`` of each (500, or all questions that fit
        into the shortest prompt if these are fewer), ``seed`` (0), ``tokenizer`` or ``pretrained``.

    Raises
    ------
    InvalidArgumentError
        If no question fits into a prompt, or all documents together are shorter than one; or as `given_by` does.
    InvalidArgumentError, InvalidTextError
        As `read_documents` does.
    """
    given = given_by(metadata)
    source = SOURCES[ruler]
    texts, questions = read_documents(source, metadata.get(source.key))
    _check_length(given, texts, source)
    chosen = list(_chosen(given, questions, given.draw(ruler)))
    rows = [
        {
            "index": index,
            "input": _filled(given, question, texts, length, given.draw(ruler, index)),
            "outputs": list(question.answers),
            "max_length": length,
            "gen_prefix": _PREFIX,
        }
        for index, question in enumerate(
            tqdm(chosen, unit="question", desc=f"making prompts of {ruler}", leave=False)
        )
        for length in given.lengths
    ]
    return {"test": Dataset.from_list(in_turn(rows), split="test")}


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether the answer holds one of the right ones, under the prompt's length, as RULER scores it.

    lm-eval 0.4.13 takes the share of them, so that one of three spellings is a third.
    """
    (said,) = common_utils.postprocess_pred(results)
    is_right = any(answer.lower() in said.lower() for answer in doc["outputs"])
    return {str(doc["max_length"]): float(is_right)}


def read_documents(source: Source, path: Any) -> tuple[list[str], list[Question]]:
    """Return all documents of a file, sorted, and its questions that have an answer.

    Raises
    ------
    InvalidArgumentError
        If no file is named.
    InvalidTextError
        If it cannot be read, is in another format, or has no such question.
    """
    if not path or not isinstance(path, str):
        raise InvalidArgumentError(
            f"This task asks questions on documents: pass the path of {source.known} as {source.key!r} in the "
            f"metadata, got {path!r}"
        )
    content = read_text(path)
    try:
        parts = source.parts(json.loads(content))
    except (*_WRONG, RecursionError) as error:
        raise _other_format(path, source, error) from error
    texts: set[str] = set()
    questions: list[Question] = []
    for place, part in enumerate(parts):
        try:
            documents, asked = source.parse(part)
        except _WRONG as error:
            raise _other_format(path, source, error, f" at place {place}") from error
        texts.update(documents)
        questions += [each for each in asked if each.answers]
    if not questions:
        raise InvalidTextError(f"{path!r} has no question with an answer: pass {source.known}")
    return sorted(texts), questions


def _other_format(path: str, source: Source, error: Exception, place: str = "") -> InvalidTextError:
    return InvalidTextError(
        f"{path!r} cannot be read as {source.key!r}{place}: {type(error).__name__}: {error}. Pass {source.known}"
    )


def _check_length(given: Given, texts: Sequence[str], source: Source) -> None:
    longest, tokens = max(given.lengths), 0
    for text in texts:  # until there are enough, as there may be very many
        tokens += given.count(text)
        if tokens >= longest:
            return
    raise InvalidArgumentError(
        f"All documents of {source.key!r} together have {tokens:,} tokens, fewer than a prompt of {longest:,}: pass a "
        "file with more, or take shorter max_seq_lengths"
    )


def _chosen(given: Given, questions: Sequence[Question], draw: Random) -> Iterator[Question]:
    """Yield questions, in random order, whose documents fit into the shortest prompt."""
    left, shortest = given.samples, min(given.lengths)
    for question in draw.sample(questions, len(questions)):
        if left and _tokens(given, _prompt(question, question.documents)) <= shortest:
            left -= 1
            yield question
    if left == given.samples:
        raise InvalidArgumentError(
            f"None of {len(questions):,} questions fits with its documents into a prompt of {shortest:,} tokens: take "
            "longer max_seq_lengths"
        )


def _filled(given: Given, question: Question, texts: Sequence[str], length: int, draw: Random) -> str:
    """Return a prompt of at most so many tokens with its answer."""
    own = {*question.documents}
    near = [text for text in dict.fromkeys(question.near) if text not in own]
    others = draw.sample(near, len(near))
    known = own.union(near)
    others += [text for text in draw.sample(texts, len(texts)) if text not in known]
    room = length - _tokens(given, _prompt(question, question.documents))
    taken = 0
    for text in others:
        room -= given.count(DOCUMENT_PROMPT.format(i=taken + 1, document=text) + "\n\n")
        if room < 0:
            break
        taken += 1
    ranks = {text: draw.random() for text in (*question.documents, *others[:taken])}
    while True:
        documents = sorted({*question.documents, *others[:taken]}, key=ranks.__getitem__)
        prompt = _prompt(question, documents)
        if not taken or _tokens(given, prompt) <= length:
            return prompt
        taken -= 1  # texts that meet can have more tokens than each alone


def _tokens(given: Given, prompt: str) -> int:
    """Return how many tokens a prompt has with its answer."""
    return given.count(f"{prompt} {_PREFIX}") + _ANSWER


def _prompt(question: Question, documents: Sequence[str]) -> str:
    numbered = (DOCUMENT_PROMPT.format(i=number, document=text) for number, text in enumerate(documents, 1))
    return str(TEMPLATE.format(context="\n\n".join(numbered), query=question.text))


def _articles(found: Any) -> Sequence[Any]:
    if not isinstance(found, dict) or not isinstance(found.get("data"), list):
        raise TypeError("expected an object with a list of articles as 'data'")
    return list(found["data"])


def _article(article: Any) -> tuple[Sequence[str], Sequence[Question]]:
    paragraphs = [(_text(each["context"]), each["qas"]) for each in article["paragraphs"]]
    near = tuple(text for text, _ in paragraphs)
    questions = [
        Question(
            _text(each["question"]), _answers(answer["text"] for answer in each["answers"]), (text,), near
        )
        for text, asked in paragraphs
        for each in asked
        if each.get("is_impossible") is not True
    ]
    return near, questions


def _questions(found: Any) -> Sequence[Any]:
    if not isinstance(found, list):
        raise TypeError("expected a list of questions")
    return found


def _question(found: Any) -> tuple[Sequence[str], Sequence[Question]]:
    context = found["context"]
    if isinstance(context, dict):  # as the data set on the hub has it
        context = zip(context["title"], context["sentences"], strict=True)
    titled = [(_text(title), f"{title}\n{''.join(sentences)}") for title, sentences in context]
    if not titled:
        raise ValueError("a question without documents")
    if needed := _supporting(found.get("supporting_facts", ())) - {title for title, _ in titled}:
        raise ValueError(
            f"the question lacks the document {min(needed)!r}, which its answer needs, as in HotpotQA's fullwiki file"
        )
    documents = tuple(text for _, text in titled)
    return documents, [Question(_text(found["question"]), _answers([found["answer"]]), documents)]


def _supporting(facts: Any) -> set[str]:
    """Return the titles of documents that an answer needs."""
    if isinstance(facts, dict):  # as the data set on the hub has it
        return {_text(title) for title in facts["title"]}
    return {_text(title) for title, _ in facts}


def _answers(found: Any) -> tuple[str, ...]:
    """Return answers without blanks around them; one that is blank would always be right."""
    return tuple(each.strip() for each in found if each.strip())


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"expected a text, got {value!r:.40}")
    return value


SOURCES = {
    "qa_1": Source(
        "squad", _articles, _article, "SQuAD's dev-v2.0.json or a file like it, such as XQuAD's xquad.en.json"
    ),
    "qa_2": Source("hotpotqa", _questions, _question, "HotpotQA's hotpot_dev_distractor_v1.json"),
}
"""RULER's tasks on documents."""
