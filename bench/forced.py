"""generate() that says a given text: its losses, and when each token came."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from ratios import Clock
from torch import Tensor
from transformers import LogitsProcessor

from memlong import MemoryDecoder


class Forced(LogitsProcessor):
    """Lets generate() choose given tokens one after the other, and notes how likely they were.

    Attributes
    ----------
    nll
        Negative log-likelihood of each token so far, in nats.
    marks
        When each was chosen, in seconds.
    """

    def __init__(self, targets: Tensor, clock: Clock = Clock.WALL) -> None:
        self.nll: list[float] = []
        self.marks: list[float] = []
        self._targets: list[int] = targets.tolist()
        self._clock = clock

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - as transformers calls it
        """Return scores [1, vocabulary] that leave only the given token."""
        target = self._targets[len(self.nll)]
        self.nll.append(float(-scores[0].float().log_softmax(-1)[target]))  # waits for the device
        self.marks.append(self._clock.now())
        chosen = torch.full_like(scores, float("-inf"))
        chosen[0, target] = 0
        return chosen


def say(decoder: MemoryDecoder, prompt: Tensor, targets: Tensor, clock: Clock = Clock.WALL) -> Forced:
    """Generate the tokens ``targets`` [tokens] after a prompt [1, tokens]; the stream stays where it is."""
    forced = Forced(targets, clock)
    decoder.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        remember=False,
        do_sample=False,
        max_new_tokens=len(targets),
        eos_token_id=[],  # a text may hold any token
        pad_token_id=0,
        logits_processor=[forced],
    )
    return forced


def generated_losses(
    decoder: MemoryDecoder, input_ids: Tensor, last: int, progress: Callable[[int], None] = lambda _: None
) -> NDArray[np.float64]:
    """Return losses [last] of the last tokens of a text [1, tokens], read one at a time as generation reads them.

    ``progress`` is called with the number of tokens in each forward call of what comes before them.
    """
    decoder.reset()
    said = input_ids.shape[1] - last
    if said > 1:
        for segment in decoder.stream(input_ids[:, : said - 1], logits="last"):
            progress(segment.tokens.shape[1])
    return np.array(say(decoder, input_ids[:, said - 1 : said], input_ids[0, said:]).nll)
