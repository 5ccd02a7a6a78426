"""Passkey retrieval: find a number hidden at any depth of a text of any length."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memlong.decoder import MemoryDecoder
from memlong.errors import InvalidArgumentError
from memlong.evaluation.numbers import checked_logits
from memlong.evaluation.text import opening_tokens

OPENING = "There is an important pass key hidden inside a lot of irrelevant text. Find it and remember it.\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"

_LONGEST = 10**8  # tokens of a prompt, which must fit in RAM


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
    """

    length: int
    depth: float
    trials: int
    accuracy: float


def passkey_prompt(tokenizer: Any, length: int, depth: float, key: int, filler: str = FILLER) -> Tensor:
    """Return a prompt [1, length] that hides a pass key at a depth and ends with the question for it.

    It starts with the special tokens that the tokenizer puts at the start of a text, if any. The format is that of
    Mohtashami and Jaggi (arXiv 2305.16300, section 4.2).

    Raises
    ------
    InvalidArgumentError
        If the length is too short for needle and question, or too long, or the depth is not from 0 to 1.
    """
    if length > _LONGEST:
        raise InvalidArgumentError(f"length must be at most {_LONGEST:,} tokens, got {length}")
    if not 0 <= depth <= 1:
        raise InvalidArgumentError(f"depth must be a number from 0 to 1, got {depth}")
    opening, needle, question = (
        _ids(tokenizer, text) for text in (OPENING, NEEDLE.format(key=key), QUESTION)
    )
    opening = [*opening_tokens(tokenizer), *opening]
    filler_tokens = length - len(opening) - len(needle) - len(question)
    if filler_tokens < 0:
        raise InvalidArgumentError(
            f"length must be at least {length - filler_tokens} tokens, for opening, pass key and question, got {length}"
        )
    line = _ids(tokenizer, filler)
    if not line:
        raise InvalidArgumentError("filler must not be empty: give some text, or leave it out")
    # Whole lines before the needle, so that it does not start in the middle of a sentence.
    before = round(depth * filler_tokens / len(line)) * len(line) if depth < 1 else filler_tokens
    before = min(before, filler_tokens)
    hay = list(itertools.islice(itertools.cycle(line), before))
    rest = list(itertools.islice(itertools.cycle(line), filler_tokens - before))
    return torch.tensor([[*opening, *hay, *needle, *rest, *question]], dtype=torch.long, device="cpu")


def evaluate_needle(
    decoder: MemoryDecoder,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    trials: int = 1,
    filler: str = FILLER,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Cell]:
    """Ask for a hidden pass key at every length and depth; each trial is a separate stream.

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
        Random seed of the pass keys.
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
    for length, depth in itertools.product(lengths, depths):  # fail early
        passkey_prompt(decoder.tokenizer, length, depth, 10_000, filler)
    numbers = random.Random(seed)  # noqa: S311 - not for cryptography
    cells = []
    for length, depth in itertools.product(lengths, depths):
        right = 0
        for _ in range(trials):
            key = numbers.randrange(10_000, 100_000)
            prompt = passkey_prompt(decoder.tokenizer, length, depth, key, filler)
            right += _finds(decoder, prompt, str(key), progress)
        cells.append(Cell(length, depth, trials, right / trials))
    return cells


def _finds(decoder: MemoryDecoder, prompt: Tensor, key: str, progress: Callable[[int], None] | None) -> bool:
    decoder.reset()
    for segment in decoder.stream(prompt[:, :-1], logits="last"):
        if progress is not None:
            progress(segment.tokens.shape[1])
    new = len(_ids(decoder.tokenizer, f" {key}.")) + 2
    last = prompt[:, -1:]
    said = decoder.generate(
        last,
        torch.ones_like(last),
        max_new_tokens=new,
        do_sample=False,
        remember=False,
        logits_processor=[checked_logits],
    )
    answer: str = decoder.tokenizer.decode(said[0, 1:])
    return answer.strip().startswith(key)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, verbose=False
    ).input_ids
    return ids
