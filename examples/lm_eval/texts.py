"""Perplexity of texts of your own, each a document that is read from its beginning."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from datasets import Dataset

from memlong.bank import whole_number
from memlong.evaluation import read_text


def texts(text: str | None = None, characters: int | None = None, **others: Any) -> dict[str, Dataset]:
    """Return the documents: a text file, or those of a folder; ``characters`` is what is read of each at most.

    lm-eval passes what ``--metadata`` names.
    """
    if text is None:
        raise ValueError('text is missing: name your file, as in --metadata \'{"text": "book.txt"}\'')
    if near := [key for key in others if get_close_matches(key, ["characters"])]:
        raise ValueError(f"The metadata has {near[0]!r}, which no task looks for: did you mean 'characters'?")
    if characters is not None:
        whole_number("characters", characters, at_least=1)
    path = Path(text)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise ValueError(f"{text!r} must be a text file, or a folder with .txt files in it")
    return {"test": Dataset.from_list([{"text": read_text(file)[:characters]} for file in files])}
