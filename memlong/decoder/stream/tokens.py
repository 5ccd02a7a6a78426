"""From a user's tensors to lists of token ids, and back to arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from memlong.decoder.arrays import Ints
from memlong.decoder.model.layout import ModelLayout
from memlong.errors import InvalidArgumentError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def token_lists(
    input_ids: Tensor, attention_mask: Tensor | None, model_layout: ModelLayout
) -> list[list[int]]:
    """Check shapes and ids, and remove the padding.

    Parameters
    ----------
    input_ids
        [rows, tokens], integers from 0 to ``model_layout.vocabulary`` - 1.
    attention_mask
        [rows, tokens], 0 where padded; None where nothing is.
    model_layout
        Which tokens the model knows, and which of them stand for an image or the like.

    Returns
    -------
    list of list of int
        The token ids of each row.

    Raises
    ------
    InvalidArgumentError
        If a shape, a type or a token id is wrong, or a token does not stand for text.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.dtype not in _INTEGERS:
        raise InvalidArgumentError(
            f"input_ids must be an integer tensor [rows, tokens], got {_kind(input_ids)}{_remedy(input_ids)}"
        )
    if attention_mask is None:
        rows: list[list[int]] = input_ids.tolist()
    elif not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        raise InvalidArgumentError(
            f"attention_mask must be a tensor of the shape of input_ids, {tuple(input_ids.shape)}, got "
            f"{_kind(attention_mask)}"
        )
    elif not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise InvalidArgumentError("attention_mask must be 1, and 0 where padded, got other numbers")
    else:
        kept = attention_mask.bool().to(input_ids.device)
        rows = [ids[mask].tolist() for ids, mask in zip(input_ids, kept, strict=True)]
    if not rows:
        raise InvalidArgumentError("input_ids must have at least one row, got none")
    vocabulary = model_layout.vocabulary
    for row in rows:
        if row and not 0 <= min(row) <= max(row) < vocabulary:
            odd = next(token for token in row if not 0 <= token < vocabulary)
            raise InvalidArgumentError(
                f"input_ids must be from 0 to {vocabulary - 1}, the model's tokens, got {odd}. Use its own tokenizer, "
                "and an attention_mask that is 0 where input_ids is padded"
            )
        if not model_layout.placeholders.keys().isdisjoint(row):
            token = next(token for token in row if token in model_layout.placeholders)
            raise InvalidArgumentError(
                f"input_ids must be text, got {token}, which stands for {model_layout.placeholders[token]}. Leave it "
                "out, or use the model outside `with decoder:`"
            )
    return rows


def left_padded(rows: Sequence[Sequence[int]], padding: int) -> Ints:
    """Return numbers of each row as one array [rows, longest], padded on the left."""
    padded = np.full((len(rows), max(map(len, rows))), padding, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[len(target) - len(row) :] = row
    return padded


def _kind(given: object) -> str:
    if isinstance(given, Tensor):
        return f"{tuple(given.shape)} of {given.dtype}"
    return type(given).__name__


def _remedy(given: object) -> str:
    if isinstance(given, str):
        return ". Tokenize text with tokenizer(text, return_tensors='pt').input_ids"
    if isinstance(given, Mapping):
        return ". Pass what the tokenizer returned as **encoding, or its input_ids alone"
    if isinstance(given, Tensor):
        return ". For a single text, pass input_ids[None]" if given.ndim == 1 else ""
    return ". Convert lists or arrays with torch.as_tensor"
