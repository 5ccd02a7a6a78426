"""In-context learning: with labelled examples in memory, is the label of another text found?"""

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
    """How a demonstration is written, and how a question: as one that ends before its word.

    Attributes
    ----------
    question
        What stands before the word, with ``{text}`` in it and no space at its end.
    gap
        The space before the word.
    rest
        What stands after the word.
    separator
        The space at the end, which stands between demonstrations.
    """

    question: str
    gap: str
    rest: str
    separator: str

    @classmethod
    def parse(cls, template: str) -> Self:
        """Take a template apart.

        Raises
        ------
        InvalidArgumentError
            If ``{text}`` and ``{word}`` do not stand in it once each, in this order.
        """
        before, _, after = template.partition("{word}")
        if template.count("{text}") != 1 or template.count("{word}") != 1 or "{text}" not in before:
            raise InvalidArgumentError(
                f"template is {template!r}; expected {{text}} and then {{word}} in it, once each, such as {TEMPLATE!r}."
            )
        question, rest = before.rstrip(), after.rstrip()
        return cls(question, before[len(question) :], rest, after[len(rest) :])

    def demonstrate(self, examples: Sequence[Example]) -> str:
        """Return the demonstrations, without the space at their end."""
        return self.separator.join(
            self.question.replace("{text}", each.text) + self.gap + each.word + self.rest for each in examples
        )

    def ask(self, text: str) -> str:
        """Return the question for the word of a text, as it follows demonstrations."""
        return self.separator + self.question.replace("{text}", text)


@dataclass(frozen=True)
class Shots:
    """How often the word was found after so many demonstrations.

    Attributes
    ----------
    shots
        How many demonstrations were read.
    demonstration_tokens
        How many tokens they are.
    predictions
        The word that was said for each test.
    accuracy
        Share of the tests whose word was said, with a 95 % interval.
    seconds
        Wall time of reading and asking.
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
    """Read demonstrations, then ask for the word of each test; no test sees anything of another.

    Demonstrations that leave the local window live in memory; without a backend, those that the window holds are all
    there are. The answer is the word whose first token is likeliest. This is the in-context learning of the MemLong
    paper (arXiv 2408.16967).

    Parameters
    ----------
    decoder
        An attached decoder; its streams are reset for each number of shots.
    task
        What is shown and asked.
    shots
        How many of the task's demonstrations to read, the first ones; one result for each.
    template
        How a demonstration is written, with ``{text}`` and ``{word}``.
    calibrate
        Divide the probability of a word by that which it has where the text is "N/A": contextual calibration
        (arXiv 2102.09690), against a model's liking for one word.
    seed
        Of the intervals' draws.
    progress
        Called with the number of tests answered.

    Raises
    ------
    InvalidArgumentError
        If a number of shots or the template cannot be used, or two words begin with the same token.
    InvalidTextError
        If a text holds half a character.
    MemlongError
        If the model's logits are not numbers.
    """
    for count in shots:
        if not 1 <= count <= len(task.demonstrations):
            raise InvalidArgumentError(
                f"shots is {count}; expected 1 to {len(task.demonstrations)}, as many as were drawn."
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
        # A word's probability is compared with this one.
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
    """Log-probability [words] of each word's first token after a question, which the streams forget again."""
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
    """Return the token that each word begins with after a question; one token decides only if they differ."""
    question = form.ask(CONTENT_FREE)
    asked = _ids(tokenizer, question)
    words_by_token: dict[int, list[str]] = {}
    for word in words:
        answered = _ids(tokenizer, question + form.gap + word)
        if answered[: len(asked)] != asked or len(answered) == len(asked):
            raise InvalidArgumentError(
                f"The tokenizer joins the word {word!r} to the end of the question, so no token is the answer. Choose "
                "a template with a space before {word}."
            )
        words_by_token.setdefault(answered[len(asked)], []).append(word)
    shared = [" and ".join(map(repr, same)) for same in words_by_token.values() if len(same) > 1]
    if shared:
        raise InvalidArgumentError(
            f"{'; '.join(shared)} begin with the same token, and the first token decides. Choose other words for "
            "these labels, such as --labels 0=negative,1=positive."
        )
    return list(words_by_token)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, verbose=False
    ).input_ids
    return ids
