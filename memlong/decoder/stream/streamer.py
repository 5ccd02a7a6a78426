"""Print an answer as it is made, on whatever console there is."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable
from typing import Any

from transformers import TextStreamer


def text_streamer(tokenizer: Any, say: Callable[[str], object] | None = None) -> TextStreamer:
    """Return a streamer for generate() that prints the answer as it is made.

    What would command the terminal, and characters that it does not have, are printed as escapes.

    Parameters
    ----------
    tokenizer
        The model's.
    say
        Prints a part of the answer; by default on standard output.
    """
    return _SafeStreamer(tokenizer, say or _print)


def printable(text: str) -> str:
    """Return text of several lines with escapes for what would command the terminal, and for what it cannot show."""
    text = "".join(repr(each)[1:-1] if _commands(each) else each for each in text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _commands(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) == "Cc"


class _SafeStreamer(TextStreamer):
    def __init__(self, tokenizer: Any, say: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is decided."""
        self._say(printable(text) + ("\n" if stream_end else ""))


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
