"""From the tensors that a user gives to lists of token ids."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from memlong.decoder.model.layout import ModelLayout
from memlong.errors import InvalidArgumentError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def token_lists(input_ids: Tensor, attention_mask: Tensor | None, layout: ModelLayout) -> list[list[int]]:
    """Check shapes and ids, and take the padding out.

    Parameters
    ----------
    input_ids
        [rows, tokens], integers from 0 to ``layout.vocabulary`` - 1.
    attention_mask
        [rows, tokens], 0 where padded; None where nothing is.
    layout
        Which tokens the model knows, and which of them stand for an image or the like.

    Returns
    -------
    list of list of int
        The token ids of each row.

    Raises
    ------
    InvalidArgumentError
        If a shape, a type or a token id is wrong, or a token stands for what is no text.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.dtype not in _INTEGERS:
        raise InvalidArgumentError(
            f"input_ids is {_kind(input_ids)}; expected an integer tensor [rows, tokens].{_remedy(input_ids)}"
        )
    if attention_mask is None:
        rows: list[list[int]] = input_ids.tolist()
    elif not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        raise InvalidArgumentError(
            f"attention_mask is {_kind(attention_mask)}; expected a tensor like input_ids, {tuple(input_ids.shape)}."
        )
    elif not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise InvalidArgumentError("attention_mask holds other numbers than 1, and 0 where padded.")
    else:
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
    if not rows:
        raise InvalidArgumentError("input_ids has no rows; expected an integer tensor [rows, tokens].")
    vocabulary = layout.vocabulary
    for row in rows:
        if row and not 0 <= min(row) <= max(row) < vocabulary:
            odd = next(token for token in row if not 0 <= token < vocabulary)
            raise InvalidArgumentError(
                f"input_ids holds {odd}; the model's tokens go from 0 to {vocabulary - 1}. Use its own tokenizer, and "
                "an attention_mask that is 0 where input_ids is padded."
            )
        if not layout.placeholders.keys().isdisjoint(row):
            token = next(token for token in row if token in layout.placeholders)
            raise InvalidArgumentError(
                f"input_ids holds {token}, which stands for {layout.placeholders[token]}: a memory holds text alone. "
                "Leave it out, or use the model without `with decoder:`."
            )
    return rows


def _kind(given: object) -> str:
    if isinstance(given, Tensor):
        return f"{tuple(given.shape)} of {given.dtype}"
    return type(given).__name__


def _remedy(given: object) -> str:
    if isinstance(given, str):
        return " Make tokens of text with tokenizer(text, return_tensors='pt').input_ids."
    if isinstance(given, Mapping):
        return " Give what the tokenizer returned as **encoding, or its input_ids alone."
    if isinstance(given, Tensor):
        return " For one text, that is input_ids[None]." if given.ndim == 1 else ""
    return " Make one of lists or arrays with torch.as_tensor."
