"""Print an answer as it is made, on whatever console there is."""

from __future__ import annotations

import sys
import unicodedata
from typing import Any

from transformers import TextStreamer


def text_streamer(tokenizer: Any) -> TextStreamer:
    """Return a streamer for generate() that prints the answer as it is made.

    What would command the terminal, and characters that it does not have, are printed as escapes.
    """
    return _SafeStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def printable(text: str) -> str:
    """Return text of several lines with escapes for what would command the terminal, and for what it cannot show."""
    text = "".join(repr(each)[1:-1] if _commands(each) else each for each in text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _commands(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) == "Cc"


class _SafeStreamer(TextStreamer):
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is decided."""
        super().on_finalized_text(printable(text), stream_end)
