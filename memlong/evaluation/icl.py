"""In-context learning: predict the label of a text, with labeled examples in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from memlong.decoder import MemoryDecoder
from memlong.errors import InvalidArgumentError
from memlong.evaluation.bootstrap import Accuracy, accuracy_interval
from memlong.evaluation.examples import Example, Task
from memlong.evaluation.numbers import checked_logits
from memlong.evaluation.text import check_characters, tokenize

TEMPLATE = "Review: {text}\nSentiment: {word}\n\n"
CONTENT_FREE = "N/A"


@dataclass(frozen=True)
class Template:
    """The format of a demonstration; a question is a demonstration cut off before its word.

    Attributes
    ----------
    question
        The part before the word, with ``{text}`` and without trailing space.
    gap
        The space before the word.
    rest
        The part after the word.
    separator
        The trailing space, which separates demonstrations.
    """

    question: str
    gap: str
    rest: str
    separator: str

    @classmethod
    def parse(cls, template: str) -> Self:
        """Parse a template.

        Raises
        ------
        InvalidArgumentError
            If the template does not contain ``{text}`` and then ``{word}``, once each.
        """
        before, _, after = template.partition("{word}")
        if template.count("{text}") != 1 or template.count("{word}") != 1 or "{text}" not in before:
            raise InvalidArgumentError(
                f"template must contain {{text}} and then {{word}}, once each, such as {TEMPLATE!r}, got {template!r}"
            )
        question, rest = before.rstrip(), after.rstrip()
        return cls(question, before[len(question) :], rest, after[len(rest) :])

    def demonstrate(self, examples: Sequence[Example]) -> str:
        """Format demonstrations, without trailing space."""
        return self.separator.join(
            self.question.replace("{text}", each.text) + self.gap + each.word + self.rest for each in examples
        )

    def ask(self, text: str) -> str:
        """Format a question, to follow demonstrations."""
        return self.separator + self.question.replace("{text}", text)


@dataclass(frozen=True)
class Shots:
    """The accuracy with a given number of demonstrations.

    Attributes
    ----------
    shots
        Number of demonstrations read.
    demonstration_tokens
        Their length in tokens.
    predictions
        The predicted word for each test.
    accuracy
        Share of correct predictions, with a 95 % confidence interval.
    seconds
        Wall time of reading and predicting.
    """

    shots: int
    demonstration_tokens: int
    predictions: tuple[str, ...]
    accuracy: Accuracy
    seconds: float


def evaluate_icl(
    decoder: MemoryDecoder,
    task: Task,
    shots: Sequence[int],
    *,
    template: str = TEMPLATE,
    calibrate: bool = False,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Shots]:
    """Read demonstrations, then predict the word of each test; tests do not see each other.

    Demonstrations that leave the local window are in memory; without a backend, only those in the window count. The
    prediction is the word whose first token has the highest probability. This is the in-context learning setup of the
    MemLong paper (arXiv 2408.16967).

    Parameters
    ----------
    decoder
        An attached decoder; its streams are reset for each number of shots.
    task
        The demonstrations and tests.
    shots
        Numbers of demonstrations to read, from the task's first on; one result for each.
    template
        Format of a demonstration, with ``{text}`` and ``{word}``.
    calibrate
        Divide each word's probability by its probability for the text "N/A": contextual calibration
        (arXiv 2102.09690), which corrects a model's bias toward one word.
    seed
        Random seed of the confidence intervals.
    progress
        Called with the number of tests done.

    Raises
    ------
    InvalidArgumentError
        If a number of shots or the template is invalid, or two words start with the same token.
    InvalidTextError
        If a text contains an unpaired surrogate.
    MemlongError
        If the model's logits are NaN.
    """
    for count in shots:
        if not 1 <= count <= len(task.demonstrations):
            raise InvalidArgumentError(
                f"shots must be from 1 to {len(task.demonstrations)}, the number of demonstrations, got {count}"
            )
    form = Template.parse(template)
    for what, examples in (("A demonstration", task.demonstrations), ("A test", task.tests)):
        for example in examples:
            check_characters(what, example.text)
    for text in (template, *task.words):
        check_characters("The template or a word", text)
    tokens = _first_tokens(decoder.tokenizer, form, task.words)
    results = []
    for count in shots:
        started = time.perf_counter()
        context = tokenize(decoder.tokenizer, form.demonstrate(task.demonstrations[:count]))
        decoder.reset()
        decoder.read(context)
        # Contextual calibration: subtracted from each word's log-probability.
        base = _log_probabilities(decoder, form.ask(CONTENT_FREE), tokens) if calibrate else 0
        predictions = []
        for test in task.tests:
            found = _log_probabilities(decoder, form.ask(test.text), tokens) - base
            predictions.append(task.words[int(found.argmax())])
            if progress is not None:
                progress(1)
        right = np.array([said == test.word for said, test in zip(predictions, task.tests, strict=True)])
        seconds = time.perf_counter() - started
        share = accuracy_interval(right, seed=seed)
        results.append(Shots(count, context.shape[1], tuple(predictions), share, seconds))
    return results


def _log_probabilities(decoder: MemoryDecoder, question: str, tokens: Sequence[int]) -> Tensor:
    """Return the log-probability [words] of each word's first token after a question, without storing the question."""
    prompt = torch.tensor([_ids(decoder.tokenizer, question)], dtype=torch.long, device="cpu")
    said = decoder.generate(
        prompt,
        torch.ones_like(prompt),
        remember=False,
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits: Tensor = checked_logits(None, said.logits[0][0])  # of the first token
    return logits.float().log_softmax(-1)[list(tokens)].cpu()


def _first_tokens(tokenizer: Any, form: Template, words: Sequence[str]) -> list[int]:
    """Return each word's first token after a question; they must differ, as only the first token is compared."""
    question = form.ask(CONTENT_FREE)
    asked = _ids(tokenizer, question)
    words_by_token: dict[int, list[str]] = {}
    for word in words:
        answered = _ids(tokenizer, question + form.gap + word)
        if answered[: len(asked)] != asked or len(answered) == len(asked):
            raise InvalidArgumentError(
                f"The tokenizer merges the word {word!r} with the end of the question: put a space before {{word}} in "
                "the template"
            )
        words_by_token.setdefault(answered[len(asked)], []).append(word)
    shared = [" and ".join(map(repr, same)) for same in words_by_token.values() if len(same) > 1]
    if shared:
        raise InvalidArgumentError(
            f"Label words must differ in their first token, got {'; '.join(shared)}: choose other words, such as "
            "--labels 0=negative,1=positive"
        )
    return list(words_by_token)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, verbose=False
    ).input_ids
    return ids
