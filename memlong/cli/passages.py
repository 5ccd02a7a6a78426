"""Passages of text files, for commands that fit something to text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlong.errors import InvalidArgumentError, InvalidTextError

if TYPE_CHECKING:
    from torch import Tensor


_LEAST_FOR_FACTS = 512


def passages_of(
    files: Sequence[Path], contents: Sequence[str], tokenizer: Any, *, passages: int, passage_tokens: int
) -> list[Tensor]:
    """Return up to ``passages`` evenly spaced passages of each file, token ids [1, passage_tokens].

    Raises
    ------
    InvalidTextError
        If a file has no whole passage.
    """
    import torch

    from memlong.evaluation import tokenize

    chosen: list[Tensor] = []
    for file, content in zip(files, contents, strict=True):
        pieces = tokenize(tokenizer, content).split(passage_tokens, dim=1)
        whole = [piece for piece in pieces if piece.shape[1] == passage_tokens]
        if not whole:
            raise InvalidTextError(
                f"{str(file)!r} must have at least {passage_tokens} tokens, one passage: give a longer text, or a "
                "smaller --passage-tokens"
            )
        places = torch.linspace(0, len(whole) - 1, min(passages, len(whole))).round().long().tolist()
        chosen += [whole[place] for place in places]
    return chosen


def passages_of_facts(
    tokenizer: Any, filler: Sequence[Tensor], *, passages: int, passage_tokens: int, seed: int
) -> list[Tensor]:
    """Return passages of generated facts of each kind, hidden in texts of token ids [tokens].

    Raises
    ------
    InvalidArgumentError, InvalidTextError
        If passages are too short for a fact and a question, or there is too little text.
    """
    from memlong.training.recall import RecallEpisodes

    if passage_tokens < _LEAST_FOR_FACTS:
        raise InvalidArgumentError(
            f"--passage-tokens must be at least {_LEAST_FOR_FACTS} with --facts, for facts and the questions after "
            f"them, got {passage_tokens}"
        )
    chosen: list[Tensor] = []
    for kind in ("dictionary", "needles", "variables"):
        quarter = passage_tokens // 4
        try:
            source = RecallEpisodes(
                kind,
                tokenizer,
                filler,
                tokens=passage_tokens,
                segment_size=quarter,
                local_window=quarter,
                seed=seed,
            )
        except InvalidTextError:
            raise
        except InvalidArgumentError as error:
            raise InvalidArgumentError(
                f"--passage-tokens must be larger with --facts, got {passage_tokens}: a quarter of it must hold any "
                f"fact of {kind!r}, or a question and its answer. Try {2 * passage_tokens}"
            ) from error
        chosen += [source[number].tokens[None] for number in range(passages)]
    return chosen
