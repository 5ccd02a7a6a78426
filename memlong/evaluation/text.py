"""Read a text file and turn it into tokens, with errors that a user can act on."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memlong.errors import InvalidTextError

_PLACE = "memlong's place for words"
_LETTER = "a"  # any text would do
_MARKS = (  # those of UTF-32 begin with those of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: str | Path) -> str:
    """Read a text file: UTF-8, or another Unicode that its byte-order mark tells; all lines end alike.

    Raises
    ------
    InvalidTextError
        If it is missing, unreadable, binary or empty.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InvalidTextError(f"The text file {str(path)!r} does not exist. Check the path.") from error
    except OSError as error:
        raise InvalidTextError(f"The text file {str(path)!r} cannot be read: {error.strerror}.") from error
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in data:
        raise InvalidTextError(
            f"The file {str(path)!r} is binary, or UTF-16 without a byte-order mark. Give a UTF-8 text file."
        )
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InvalidTextError(
            f"The text file {str(path)!r} is not {encoding.upper()}: {error.reason} at byte {error.start}. Convert it, "
            "for instance with iconv -t UTF-8."
        ) from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise InvalidTextError(f"The text file {str(path)!r} is empty. Give a file with text in it.")
    return text


def tokenize(
    tokenizer: Any,
    text: str,
    max_tokens: int | None = None,
    *,
    begins: bool = True,
    control_tokens: bool = False,
) -> Tensor:
    """Tokens of a text [1, tokens], int64, at most ``max_tokens`` of them.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer.
    text
        What to read.
    max_tokens
        Use only the first ones; None uses all.
    begins
        Whether the text is the first of its stream, and so has the special tokens with which the tokenizer has one
        begin. There are none anywhere else.
    control_tokens
        Whether the name of a control token, such as ``<|im_end|>``, stands for that token. By default it is text, as
        any other: a book, or a log, is not to end a turn.

    Raises
    ------
    InvalidTextError
        If ``max_tokens`` is below 1, or the text holds half a character.
    """
    if max_tokens is not None and max_tokens < 1:
        raise InvalidTextError(f"max_tokens is {max_tokens}; expected at least 1.")
    check_characters("The text", text)
    words = _ids(tokenizer, text, control_tokens=control_tokens)
    ids = [*(opening_tokens(tokenizer) if begins else []), *words]
    return torch.tensor([ids[:max_tokens]], dtype=torch.long, device="cpu")


def chat_turn(
    tokenizer: Any, said: str, *, begins: bool = True, history: Sequence[Mapping[str, str]] = ()
) -> Tensor:
    """Tokens [1, tokens], int64, of what a user says, in the tokenizer's chat template, up to the answer.

    Control tokens are those of the template; their names in what the user says are text.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer with a chat template.
    said
        The user's words.
    begins
        Whether the turn is the first of its stream; what begins a stream is left out of any other.
    history
        What was said before, as chat templates take it (``{"role": ..., "content": ...}``), if the stream has read
        that: then only what the template puts behind it is returned.

    Raises
    ------
    InvalidTextError
        If the text holds half a character, or the template writes what was said before in another way.
    """
    check_characters("The text", said)
    hides = any(token in said for token in tokenizer.all_special_tokens)
    whole = _templated(tokenizer, [*history, {"role": "user", "content": _PLACE if hides else said}])
    if history:
        known = _templated(tokenizer, history, asks=False).rstrip()
        if not whole.startswith(known):
            raise InvalidTextError(
                "The chat template does not continue this conversation: it writes what was said before in another way. "
                "Call reset(), and read the whole conversation."
            )
        whole = whole.removeprefix(known)
    before, _, after = whole.partition(_PLACE) if hides else (whole, "", "")
    ids = _ids(tokenizer, before, control_tokens=True)
    if hides:
        ids += [*_ids(tokenizer, said), *_ids(tokenizer, after, control_tokens=True)]
    opening = opening_tokens(tokenizer)
    if not (begins or history) and ids[: len(opening)] == opening:
        ids = ids[len(opening) :]
    return torch.tensor([ids], dtype=torch.long, device="cpu")


def opening_tokens(tokenizer: Any) -> list[int]:
    """Return the special tokens that a tokenizer, by its own default, puts before a text: often none or one."""
    bare, whole = _ids(tokenizer, _LETTER), _ids(tokenizer, _LETTER, add_special_tokens=True)
    before = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
    return whole[:before]


def check_characters(what: str, text: str) -> None:
    """Refuse half characters, which is how Python passes on bytes that are no UTF-8.

    Parameters
    ----------
    what
        What the text is, for the message.
    text
        To be checked.

    Raises
    ------
    InvalidTextError
        If there is one, naming its place.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidTextError(
            f"{what} is not UTF-8: {text[error.start]!r} at character {error.start}. Type it in a UTF-8 terminal, or "
            "convert it."
        ) from error


def _templated(tokenizer: Any, turns: Sequence[Mapping[str, str]], *, asks: bool = True) -> str:
    text: str = tokenizer.apply_chat_template(list(turns), add_generation_prompt=asks, tokenize=False)
    return text


def _ids(
    tokenizer: Any, text: str, *, add_special_tokens: bool = False, control_tokens: bool = False
) -> list[int]:
    ids: list[int] = tokenizer(
        text, add_special_tokens=add_special_tokens, split_special_tokens=not control_tokens, verbose=False
    ).input_ids
    return ids
