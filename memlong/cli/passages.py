"""Passages of text files, for commands that fit something to text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlong.errors import InvalidTextError

if TYPE_CHECKING:
    from torch import Tensor


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
