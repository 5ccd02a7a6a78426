"""Read a text file and turn it into tokens, with errors that a user can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memlong.errors import InvalidTextError


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file.

    Raises
    ------
    InvalidTextError
        If it is missing, unreadable, binary or empty.
    """
    path = Path(path)
    if not path.exists():
        raise InvalidTextError(f"The text file {str(path)!r} does not exist. Check the path.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidTextError(f"The text file {str(path)!r} cannot be read: {error.strerror}.") from error
    if b"\0" in data:
        raise InvalidTextError(f"The file {str(path)!r} is binary, not text. Give a UTF-8 text file.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidTextError(
            f"The text file {str(path)!r} is not UTF-8: {error.reason} at byte {error.start}. Convert it, for "
            "instance with iconv -t UTF-8."
        ) from error
    if not text.strip():
        raise InvalidTextError(f"The text file {str(path)!r} is empty. Give a file with text in it.")
    return text


def tokenize(tokenizer: Any, text: str, max_tokens: int | None = None) -> Tensor:
    """Tokens of a text [1, tokens], int64, at most ``max_tokens`` of them.

    Raises
    ------
    InvalidTextError
        If ``max_tokens`` is below 1.
    """
    if max_tokens is not None and max_tokens < 1:
        raise InvalidTextError(f"max_tokens is {max_tokens}; expected at least 1.")
    ids = tokenizer(text, verbose=False).input_ids
    return torch.tensor([ids[:max_tokens]], dtype=torch.long)
