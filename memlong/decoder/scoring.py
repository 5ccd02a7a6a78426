"""How likely a model finds given continuations of a prompt, with everything read before in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memlong.bank.validate import whole_number
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.setup import Setup
from memlong.decoder.stream.asking import ask
from memlong.decoder.stream.attention_record import Counted
from memlong.decoder.stream.batch import StreamBatch
from memlong.decoder.stream.current import CurrentStreams
from memlong.decoder.stream.token_stream import TokenStream
from memlong.decoder.stream.tokens import token_lists
from memlong.errors import InvalidArgumentError


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is.

    Attributes
    ----------
    tokens
        Log-likelihood of each token after those before it [tokens], float32, in nats.
    is_greedy
        Whether each token is the most likely one [tokens].
    """

    tokens: Tensor
    is_greedy: Tensor


def score(
    setup: Setup,
    streams: CurrentStreams,
    input_ids: Tensor,
    continuations: Sequence[Tensor | Sequence[int]],
    rows: int,
) -> list[Likelihood]:
    """Score continuations of a prompt; arguments, result and errors are those of `MemoryDecoder.score`."""
    rows = whole_number("rows", rows, at_least=1)
    read = 1 if streams.batch is None else len(streams.batch.streams)
    if read != 1:
        raise InvalidArgumentError(f"score() continues one stream, and {read} have been read: call reset()")
    prompt = token_lists(input_ids, None, setup.model_layout)
    if len(prompt) != 1 or not prompt[0]:
        raise InvalidArgumentError(
            f"input_ids must be one prompt of at least one token, got shape {tuple(input_ids.shape)}"
        )
    if not isinstance(continuations, Sequence | Tensor):
        raise InvalidArgumentError(
            f"continuations must be a list of token ids for each, got {continuations!r:.80}"
        )
    wanted = [_checked(each, number, setup.model_layout) for number, each in enumerate(continuations)]
    batch = streams.forked(1)
    batch.finish(prompt)
    asked, logits = ask(batch, setup.config, answers=sum(1 for tokens in wanted if tokens))
    found: list[Likelihood] = []
    for start in range(0, len(wanted), rows):
        some = wanted[start : start + rows]
        found += _scored(asked, logits, some, setup.config.retrieval_interval)
    return found


def _checked(continuation: Tensor | Sequence[int], number: int, layout: ModelLayout) -> list[int]:
    try:
        tokens = torch.as_tensor(continuation)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgumentError(
            f"continuations[{number}] must hold token ids, got {continuation!r:.80}"
        ) from error
    is_odd = tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool
    if tokens.ndim != 1 or (len(tokens) and is_odd):
        raise InvalidArgumentError(
            f"continuations[{number}] must hold token ids [tokens], got {tokens.dtype} of shape {tuple(tokens.shape)}"
        )
    try:
        return token_lists(tokens.long()[None], None, layout)[0]
    except InvalidArgumentError as error:
        name = f"continuations[{number}]"
        raise InvalidArgumentError(str(error).partition(". ")[0].replace("input_ids", name)) from error


def _scored(
    asked: StreamBatch, logits: Tensor, wanted: Sequence[Sequence[int]], every: int
) -> list[Likelihood]:
    """Score each continuation in a fork, given the logits [1, 1, vocabulary] of the first token.

    Memory is retrieved when generate() would retrieve it.
    """
    first = torch.tensor([tokens[:1] for tokens in wanted if tokens], dtype=torch.long, device="cpu")
    found: list[list[Likelihood]] = [[] for _ in wanted]
    for mine, target in zip(
        (each for each, tokens in zip(found, wanted, strict=True) if tokens), first, strict=True
    ):
        mine.append(_likelihood(logits[0], target))
    done, longest = 0, max(map(len, wanted)) - 1
    if longest > 0:  # a fork copies the window
        forks = asked.fork([0] * len(wanted))
    while done < longest:
        is_due = (done + 1) % every == 0 or any(stream.is_full for stream in forks.streams)
        space = every if is_due else min(stream.space for stream in forks.streams)
        count = min(every - (done + 1) % every, space)
        upcoming = [tokens[done : min(done + count, len(tokens) - 1)] for tokens in wanted]
        counted = Counted(copies=len(wanted))  # all are of one row
        segment = forks.advance(upcoming, 0, retrieve=_always if is_due else _never, counted=counted)
        for row, (mine, tokens) in enumerate(zip(found, wanted, strict=True)):
            targets = torch.tensor(
                tokens[done + 1 : done + 1 + len(upcoming[row])], dtype=torch.long, device="cpu"
            )
            if len(targets):
                mine.append(_likelihood(segment.logits[row, -len(targets) :], targets))
        done += count
    return [_joined(parts) for parts in found]


def _always(_: TokenStream) -> bool:
    return True


def _never(_: TokenStream) -> bool:
    return False


def _likelihood(logits: Tensor, targets: Tensor) -> Likelihood:
    """Return how likely targets [tokens] are by logits [tokens, vocabulary]."""
    logits, targets = logits.float(), targets.to(logits.device)
    found = logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
    return Likelihood(found.cpu(), (logits.argmax(dim=-1) == targets).cpu())


def _joined(parts: Sequence[Likelihood]) -> Likelihood:
    if not parts:
        nothing = torch.empty(0, dtype=torch.float32, device="cpu")
        return Likelihood(nothing, nothing.bool())
    return Likelihood(
        torch.cat([each.tokens for each in parts]), torch.cat([each.is_greedy for each in parts])
    )
