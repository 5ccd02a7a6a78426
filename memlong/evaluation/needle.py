"""Passkey retrieval: find a number hidden at any depth of a text of any length."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlong.decoder import MemoryDecoder
from memlong.errors import InvalidArgumentError, UnsupportedModelError
from memlong.evaluation.numbers import checked_logits
from memlong.evaluation.text import opening_tokens

OPENING = "There is an important pass key hidden inside a lot of irrelevant text. Find it and remember it.\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
NAMED_OPENING = (
    "There are important pass keys hidden inside a lot of irrelevant text. Find them and remember them.\n"
)
NAMED_NEEDLE = "The pass key of the {name} is {key}. Remember it. {key} is the pass key of the {name}.\n"
NAMED_QUESTION = "What is the pass key of the {name}? The pass key of the {name} is"
_NAMES = """
    anchor bridge candle drawer engine fountain garden hammer island jacket
    kettle ladder mirror needle orchard piano quilt ribbon saddle tunnel
""".split()  # noqa: SIM905 - twenty lines otherwise

_LONG_LINE = 64  # tokens
_SENTENCE_END = re.compile(r"(?<=[.!?])(?= \S)")
_LONGEST = 10**8  # tokens of a prompt, which must fit in RAM

Span = tuple[int, int]
"""First token, and that after the last."""


@dataclass(frozen=True)
class Answer:
    """What became of one question for a pass key.

    Attributes
    ----------
    right
        Whether the pass key was answered exactly.
    source_named
        Whether, of all retrieved chunks, one that holds the pass key got the most attention, as
        `MemoryDecoder.sources` tells. None if the memory has no such chunk, as while the pass key is in the local
        window, or the model's attention does not tell.
    """

    right: bool
    source_named: bool | None


@dataclass(frozen=True)
class Cell:
    """The accuracy at one length and depth.

    Attributes
    ----------
    length
        Length of the whole prompt, in tokens.
    depth
        Position of the pass key: 0 is the beginning, 1 the end.
    trials
        Number of pass keys tried.
    accuracy
        Share of the pass keys that were answered exactly.
    answers
        Of each trial.
    """

    length: int
    depth: float
    trials: int
    accuracy: float
    answers: tuple[Answer, ...] = ()

    @classmethod
    def of(cls, length: int, depth: float, answers: Sequence[Answer]) -> Cell:
        """Count the right answers."""
        accuracy = sum(each.right for each in answers) / len(answers)
        return cls(length, depth, len(answers), accuracy, tuple(answers))


@dataclass(frozen=True, eq=False)
class Filler:
    """A tokenized text that fills prompts.

    Attributes
    ----------
    tokens
        Its token ids.
    ends
        Where a key may stand: at the beginning, and after each piece, as positions in ``tokens`` [pieces + 1].
    glue
        What must come before a key.
    """

    tokens: list[int]
    ends: NDArray[np.int64]
    glue: str

    @classmethod
    def of(cls, tokenizer: Any, text: str) -> Filler:
        """Tokenize a text once, for many prompts of the same tokenizer.

        Its pieces are lines; of long lines, sentences; and of long sentences, as many tokens as no line must exceed.
        """
        pieces: list[list[int]] = []
        lines = text.splitlines(keepends=True)
        for line in lines:
            whole = _ids(tokenizer, line)
            is_long = len(whole) > _LONG_LINE
            for part in [_ids(tokenizer, each) for each in _SENTENCE_END.split(line)] if is_long else [whole]:
                pieces += (part[start : start + _LONG_LINE] for start in range(0, len(part), _LONG_LINE))
        ends = np.cumsum([0, *map(len, pieces)])
        tokens = [token for piece in pieces for token in piece]
        return cls(tokens, ends, "" if len(pieces) == len(lines) else "\n")


def passkey_prompt(
    tokenizer: Any, length: int, depth: float, key: int, filler: str | Filler = FILLER
) -> Tensor:
    """Return a prompt [1, length] that hides a pass key at a depth and ends with the question for it.

    It starts with the special tokens that the tokenizer puts at the start of a text, if any. The format is that of
    Mohtashami and Jaggi (arXiv 2305.16300, section 4.2).

    Raises
    ------
    InvalidArgumentError
        If the length is too short for needle and question, or too long, or the depth is not from 0 to 1.
    """
    return _passkey_prompt(tokenizer, length, depth, key, filler)[0]


def _passkey_prompt(
    tokenizer: Any, length: int, depth: float, key: int, filler: str | Filler
) -> tuple[Tensor, Span]:
    """Return the prompt, and where the needle is in it."""
    if length > _LONGEST:
        raise InvalidArgumentError(f"length must be at most {_LONGEST:,} tokens, got {length}")
    if not 0 <= depth <= 1:
        raise InvalidArgumentError(f"depth must be a number from 0 to 1, got {depth}")
    hay = Filler.of(tokenizer, filler) if isinstance(filler, str) else filler
    opening, needle, question = (
        _ids(tokenizer, text) for text in (OPENING, hay.glue + NEEDLE.format(key=key), QUESTION)
    )
    opening = [*opening_tokens(tokenizer), *opening]
    filler_tokens = length - len(opening) - len(needle) - len(question)
    text, ((start, end),) = _hidden([needle], [depth], hay, filler_tokens, length)
    prompt = torch.tensor([[*opening, *text, *question]], dtype=torch.long, device="cpu")
    return prompt, (len(opening) + start, len(opening) + end)


def named_keys_prompt(
    tokenizer: Any,
    length: int,
    depths: Sequence[float],
    named: Mapping[str, int],
    filler: str | Filler = FILLER,
) -> tuple[Tensor, list[Tensor]]:
    """Return a text [1, tokens] that hides one named pass key at each depth, and the question [1, tokens] for each.

    The text and the longest question have ``length`` tokens; otherwise as `passkey_prompt`, with the same errors.
    """
    text, asked, _ = _named_keys_prompt(tokenizer, length, depths, named, filler)
    return text, asked


def _named_keys_prompt(
    tokenizer: Any, length: int, depths: Sequence[float], named: Mapping[str, int], filler: str | Filler
) -> tuple[Tensor, list[Tensor], list[Span]]:
    """Return text and questions, and where the needles are in the text."""
    if length > _LONGEST:
        raise InvalidArgumentError(f"length must be at most {_LONGEST:,} tokens, got {length}")
    if len(named) != len(depths) or not named or sorted(set(depths)) != list(depths):
        raise InvalidArgumentError(
            f"depths must ascend, one for each of the {len(named)} pass keys, got {list(depths)}"
        )
    if not 0 <= depths[0] <= depths[-1] <= 1:
        raise InvalidArgumentError(f"depths must be numbers from 0 to 1, got {list(depths)}")
    questions = [_ids(tokenizer, NAMED_QUESTION.format(name=name)) for name in named]
    hay = Filler.of(tokenizer, filler) if isinstance(filler, str) else filler
    needles = [
        _ids(tokenizer, hay.glue + NAMED_NEEDLE.format(name=name, key=key)) for name, key in named.items()
    ]
    opening = [*opening_tokens(tokenizer), *_ids(tokenizer, NAMED_OPENING)]
    filler_tokens = length - len(opening) - sum(map(len, needles)) - max(map(len, questions))
    text, spans = _hidden(needles, depths, hay, filler_tokens, length)
    prompt, *asked = (
        torch.tensor([each], dtype=torch.long, device="cpu") for each in ([*opening, *text], *questions)
    )
    return prompt, asked, [(len(opening) + start, len(opening) + end) for start, end in spans]


def _hidden(
    needles: Sequence[list[int]],
    depths: Sequence[float],
    filler: Filler,
    filler_tokens: int,
    length: int,
) -> tuple[list[int], list[Span]]:
    """Return so many tokens of filler, with needles between its pieces, at ascending depths, and where these are."""
    if filler_tokens < 0:
        raise InvalidArgumentError(
            f"length must be at least {length - filler_tokens} tokens, for opening, pass keys and question, "
            f"got {length}"
        )
    if not filler.tokens:
        raise InvalidArgumentError("filler must not be empty: give some text, or leave it out")
    hay, used = itertools.cycle(filler.tokens), 0
    text: list[int] = []
    spans: list[Span] = []
    for needle, depth in zip(needles, depths, strict=True):
        # Between pieces, so that it does not start in the middle of a sentence.
        rounds, wanted = divmod(depth * filler_tokens, len(filler.tokens))
        nearest = int(filler.ends[np.abs(filler.ends - wanted).argmin()])
        before = int(rounds) * len(filler.tokens) + nearest if depth < 1 else filler_tokens
        text += itertools.islice(hay, min(before, filler_tokens) - used)
        spans.append((len(text), len(text) + len(needle)))
        text += needle
        used = min(before, filler_tokens)
    return [*text, *itertools.islice(hay, filler_tokens - used)], spans


def evaluate_needle(
    decoder: MemoryDecoder,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    trials: int = 1,
    filler: str = FILLER,
    seed: int = 0,
    named: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Cell]:
    """Ask for a hidden pass key at every length and depth; each trial is a separate stream.

    With ``named``, one text hides a pass key at every depth, which only its name tells from the others, and all of them
    are asked for.

    Parameters
    ----------
    decoder
        An attached decoder; its streams are reset.
    lengths, depths
        The grid: prompt lengths in tokens, and positions of the pass key as a share of the length.
    trials
        Pass keys per length and depth.
    filler
        Text that is repeated to fill the prompt.
    seed
        Random seed of the pass keys, and of their names.
    named
        Whether one text hides the pass keys of all depths.
    progress
        Called with the number of tokens read.

    Raises
    ------
    InvalidArgumentError
        If a length, a depth or the number of trials is invalid.
    MemlongError
        If the model's logits are NaN.
    """
    if trials < 1:
        raise InvalidArgumentError(f"trials must be at least 1, got {trials}")
    numbers = random.Random(seed)  # noqa: S311 - not for cryptography
    hay = Filler.of(decoder.tokenizer, filler)
    if named:
        return _find_named(decoder, sorted(set(lengths)), sorted(set(depths)), trials, hay, numbers, progress)
    for length, depth in itertools.product(lengths, depths):  # fail early
        passkey_prompt(decoder.tokenizer, length, depth, 10_000, hay)
    cells = []
    for length, depth in itertools.product(lengths, depths):
        answers = []
        for _ in range(trials):
            key = numbers.randrange(10_000, 100_000)
            prompt, needle = _passkey_prompt(decoder.tokenizer, length, depth, key, hay)
            _read(decoder, prompt[:, :-1], progress)
            answers.append(_answer(decoder, prompt[:, -1:], str(key), needle))
        cells.append(Cell.of(length, depth, answers))
    return cells


def _find_named(
    decoder: MemoryDecoder,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    filler: Filler,
    numbers: random.Random,
    progress: Callable[[int], None] | None,
) -> list[Cell]:
    if len(depths) > len(_NAMES):
        raise InvalidArgumentError(f"depths must be at most {len(_NAMES)} with named, got {len(depths)}")
    hidden = [
        dict(
            zip(
                numbers.sample(_NAMES, len(depths)),
                numbers.sample(range(10_000, 100_000), len(depths)),
                strict=True,
            )
        )
        for _ in range(len(lengths) * trials)
    ]
    of_lengths = list(zip([length for length in lengths for _ in range(trials)], hidden, strict=True))
    for length, keys in of_lengths:  # fail early
        named_keys_prompt(decoder.tokenizer, length, depths, keys, filler)
    answers: dict[tuple[int, float], list[Answer]] = {(n, depth): [] for n in lengths for depth in depths}
    for length, keys in of_lengths:
        text, questions, needles = _named_keys_prompt(decoder.tokenizer, length, depths, keys, filler)
        _read(decoder, text, progress)
        for depth, question, key, needle in zip(depths, questions, keys.values(), needles, strict=True):
            answers[length, depth].append(_answer(decoder, question, str(key), needle))
    return [Cell.of(*place, found) for place, found in answers.items()]


def says(answer: str, value: str) -> bool:
    """Whether an answer begins with a value, and not with a longer one that only begins so.

    Examples
    --------
    >>> says(" 12345.", "12345"), says("123456", "12345")
    (True, False)
    """
    return re.match(re.escape(value) + r"(?!\w)", answer.strip()) is not None


def _read(decoder: MemoryDecoder, text: Tensor, progress: Callable[[int], None] | None) -> None:
    decoder.reset()
    for segment in decoder.stream(text, logits="last"):
        if progress is not None:
            progress(segment.tokens.shape[1])


def _answer(decoder: MemoryDecoder, question: Tensor, key: str, needle: Span) -> Answer:
    """Ask for a pass key that is hidden in these tokens of the text."""
    try:
        with decoder.sources() as sources:
            right = _answers(decoder, question, key)
    except UnsupportedModelError:  # it answers, but its attention does not tell of what
        return Answer(_answers(decoder, question, key), None)
    stored = [bank.spans_of(bank.ids) for bank in decoder.banks]
    if not any(_overlaps(span, needle) for spans in stored for span in spans.tolist()):
        return Answer(right, None)
    return Answer(right, any(_overlaps(each.span, needle) for each in sources.chunks[:1]))


def _overlaps(one: Sequence[int], other: Sequence[int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _answers(decoder: MemoryDecoder, question: Tensor, key: str) -> bool:
    """Whether the key follows the question [1, tokens]; nothing of it is remembered."""
    new = len(_ids(decoder.tokenizer, f" {key}.")) + 2
    said = decoder.generate(
        question,
        torch.ones_like(question),
        max_new_tokens=new,
        do_sample=False,
        remember=False,
        logits_processor=[checked_logits],
    )
    answer: str = decoder.tokenizer.decode(said[0, question.shape[1] :])
    return says(answer, key)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, verbose=False
    ).input_ids
    return ids
