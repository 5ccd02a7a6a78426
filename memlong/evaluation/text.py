"""Read text files and tokenize text, with actionable errors."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memlong.errors import InvalidTextError

_PLACE = "memlong's place for words"
_LETTER = "a"  # any text works
# What a template puts between two turns does not depend on what was said before.
_BEFORE = ({"role": "user", "content": _LETTER}, {"role": "assistant", "content": _LETTER})
_MARKS = (  # UTF-32 first: its marks start with those of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: str | Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark, and normalize its line ends.

    Raises
    ------
    InvalidTextError
        If it is missing, unreadable, binary or empty.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InvalidTextError(f"The text file {str(path)!r} does not exist: check the path") from error
    except OSError as error:
        raise InvalidTextError(f"Cannot read the text file {str(path)!r}: {error.strerror}") from error
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in data:
        raise InvalidTextError(
            f"The file {str(path)!r} is binary, or UTF-16 without a byte-order mark: give a UTF-8 text file"
        )
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InvalidTextError(
            f"The text file {str(path)!r} must be {encoding.upper()}, got {error.reason} at byte {error.start}: "
            "convert it, for instance with iconv -t UTF-8"
        ) from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise InvalidTextError(f"The text file {str(path)!r} is empty: give a file with text")
    return text


def tokenize(
    tokenizer: Any,
    text: str,
    max_tokens: int | None = None,
    *,
    begins: bool = True,
    control_tokens: bool = False,
) -> Tensor:
    """Tokenize a text into [1, tokens], int64.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer.
    text
        The text.
    max_tokens
        Keep only the first tokens; None keeps all.
    begins
        Whether the text starts its stream, and so gets the tokenizer's opening special tokens. No other special tokens
        are added.
    control_tokens
        Whether to parse the name of a control token, such as ``<|im_end|>``, as that token. By default it is plain
        text, so that a book or a log cannot end a turn.

    Raises
    ------
    InvalidTextError
        If ``max_tokens`` is below 1, or the text contains an unpaired surrogate.
    """
    if max_tokens is not None and max_tokens < 1:
        raise InvalidTextError(f"max_tokens must be at least 1, got {max_tokens}")
    check_characters("The text", text)
    words = _ids(tokenizer, text, control_tokens=control_tokens)
    ids = [*(opening_tokens(tokenizer) if begins else []), *words]
    return torch.tensor([ids[:max_tokens]], dtype=torch.long, device="cpu")


def chat_turn(
    tokenizer: Any, said: str, *, begins: bool = True, history: Sequence[Mapping[str, str]] = ()
) -> Tensor:
    """Tokenize a user's message with the chat template into [1, tokens], int64, up to where the answer starts.

    Only the template's own control tokens are parsed; their names in the message are plain text.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer with a chat template.
    said
        The user's message.
    begins
        Whether the turn starts its stream; otherwise the opening special tokens are left out.
    history
        Earlier messages that the stream has read, as chat templates take them (``{"role": ..., "content": ...}``);
        only the tokens after them are returned.

    Raises
    ------
    InvalidTextError
        If the text contains an unpaired surrogate, or the template formats earlier messages differently now.
    """
    shown, hidden = _hidden(tokenizer, [{"role": "user", "content": said}])
    whole = _templated(tokenizer, [*history, *shown])
    if history:
        known = _templated(tokenizer, history, asks=False).rstrip()
        if not whole.startswith(known):
            raise InvalidTextError(
                "The chat template must extend the conversation, but it formats earlier messages differently now: call "
                "reset(), and read the whole conversation"
            )
        whole = whole.removeprefix(known)
    ids = _with_hidden(tokenizer, whole, hidden)
    opening = opening_tokens(tokenizer)
    if not (begins or history) and ids[: len(opening)] == opening:
        ids = ids[len(opening) :]
    return torch.tensor([ids], dtype=torch.long, device="cpu")


def chat_prompt(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> Tensor:
    """Tokenize a whole conversation with the chat template into [1, tokens], int64, up to where the answer starts.

    Only the template's own control tokens are parsed, as in `chat_turn`.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer with a chat template.
    messages
        As chat templates take them (``{"role": ..., "content": ...}``); the last is the user's.

    Raises
    ------
    InvalidTextError
        If a text contains an unpaired surrogate.
    """
    shown, hidden = _hidden(tokenizer, messages)
    return torch.tensor([_with_hidden(tokenizer, _templated(tokenizer, shown), hidden)], device="cpu")


def following_turn(tokenizer: Any, said: str) -> Tensor:
    """Tokenize a user's message that follows an answer in the stream into [1, tokens]; as `chat_turn`.

    The answer has ended as the template ends it: see `end_of_turn`.
    """
    return chat_turn(tokenizer, said, begins=False, history=_BEFORE)


def end_of_turn(tokenizer: Any) -> list[int]:
    """Return the tokens with which the chat template ends an answer, for a stream whose answer was cut off."""
    turns = [_BEFORE[0], {"role": "assistant", "content": _PLACE}]
    _, _, after = _templated(tokenizer, turns, asks=False).partition(_PLACE)
    return _ids(tokenizer, after.rstrip(), control_tokens=True)


def _hidden(
    tokenizer: Any, messages: Sequence[Mapping[str, str]]
) -> tuple[list[Mapping[str, str]], dict[str, str]]:
    """Put a place where words hold the name of a control token; return the messages, and the words by place."""
    # Some that a tokenizer parses, such as <start_of_turn> of Gemma 3, have no part that `all_special_tokens` names.
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    control = {*tokenizer.all_special_tokens, *added}
    shown, hidden = [], {}
    for number, each in enumerate(messages):
        words = each["content"]
        check_characters("The text", words)
        if any(token in words for token in control):
            place = f"{_PLACE} {number}"
            hidden[place], each = words, {**each, "content": place}
        shown.append(each)
    return shown, hidden


def _with_hidden(tokenizer: Any, text: str, hidden: Mapping[str, str]) -> list[int]:
    """Tokenize a text with control tokens, and words in their places without."""
    ids: list[int] = []
    for place, words in hidden.items():
        before, _, text = text.partition(place)
        ids += [*_ids(tokenizer, before, control_tokens=True), *_ids(tokenizer, words)]
    return [*ids, *_ids(tokenizer, text, control_tokens=True)]


def opening_tokens(tokenizer: Any) -> list[int]:
    """Return the special tokens that a tokenizer puts before a text by default, usually none or one."""
    bare, whole = _ids(tokenizer, _LETTER), _ids(tokenizer, _LETTER, add_special_tokens=True)
    before = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
    return whole[:before]


def check_characters(what: str, text: str) -> None:
    """Reject unpaired surrogates, which stand for bytes that are not UTF-8 in Python strings.

    Parameters
    ----------
    what
        What the text is, for the error message.
    text
        The text to check.

    Raises
    ------
    InvalidTextError
        If there is one; the message gives its position.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidTextError(
            f"{what} must be UTF-8, got {text[error.start]!r} at character {error.start}: convert it, or type it in a "
            "UTF-8 terminal"
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
