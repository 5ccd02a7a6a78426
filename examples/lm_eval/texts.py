"""Perplexity of texts of your own, each a document that is read from its beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset


def texts(text: str | None = None, characters: int | None = None, **_: Any) -> dict[str, Dataset]:
    """Return the documents: a text file, or those of a folder; ``characters`` is what is read of each at most.

    lm-eval passes what ``--metadata`` names.
    """
    if text is None:
        raise ValueError('text is missing: name your file, as in --metadata \'{"text": "book.txt"}\'')
    path = Path(text)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
    found = [file.read_text(encoding="utf-8")[:characters] for file in files]
    if not any(found):
        raise ValueError(
            f"{text!r} must be a text file, or a folder with .txt files in it, that are not empty"
        )
    return {"test": Dataset.from_list([{"text": each} for each in found if each])}
