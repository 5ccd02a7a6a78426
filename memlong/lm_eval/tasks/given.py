"""What a run's metadata says of the prompts to make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from transformers import AutoTokenizer

from memlong.bank.validate import whole_number
from memlong.decoder.model.loading import load_tokenizer
from memlong.errors import InvalidArgumentError

SHORTEST = 1024
"""Tokens below which instructions and worked examples alone fill a prompt."""

ANSWER = 16
"""Tokens that a prompt leaves for an answer, where these tasks say how long that may be."""

KNOWN = (
    "max_seq_lengths",
    "samples",
    "seed",
    "tokenizer",
    "pretrained",
    "haystack",
    "babi",
    "needles",
    "squad",
    "hotpotqa",
)
"""What these tasks look for in the metadata."""

_MISSPELLED = 0.82  # lm-eval adds all arguments of the model, of which max_length, at 0.8, comes closest


@dataclass(frozen=True)
class Given:
    """What to make.

    Attributes
    ----------
    tokenizer
        What counts tokens.
    lengths
        Tokens that prompts may have, for each set of samples.
    samples
        Prompts of each length.
    seed
        What chance begins with.
    haystack
        A text file or a folder of such; None is the essays.
    """

    tokenizer: Any
    lengths: tuple[int, ...]
    samples: int
    seed: int
    haystack: str | None

    def draw(self, *names: object) -> Random:
        """Return chance that is the same for the same seed and names."""
        return Random("/".join(map(str, (self.seed, *names))))  # noqa: S311 - nothing secret

    def count(self, text: str) -> int:
        """Return how many tokens a text has."""
        return len(self.tokenizer(text, verbose=False).input_ids)


def given_by(metadata: Mapping[str, Any]) -> Given:
    """Read what lm-eval passes on: ``--metadata``, and the model's arguments below it.

    Raises
    ------
    InvalidArgumentError
        If a value is not valid, a key is nearly one of `KNOWN`, or nothing names a tokenizer.
    """
    _refuse_misspelled(metadata)
    lengths = metadata.get("max_seq_lengths", 4096)
    if not isinstance(lengths, Sequence) or isinstance(lengths, str):
        lengths = [lengths]
    if not lengths:
        raise InvalidArgumentError("max_seq_lengths must name at least one length, such as [4096], got none")
    return Given(
        tokenizer=_tokenizer(metadata),
        lengths=tuple(whole_number("max_seq_lengths", each, at_least=SHORTEST) for each in lengths),
        samples=whole_number("samples", metadata.get("samples", 500), at_least=1),
        seed=whole_number("seed", metadata.get("seed", 0), at_least=0),
        haystack=metadata.get("haystack"),
    )


def in_turn(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Put lengths side by side, so that the first samples, which ``--limit`` leaves, are of all lengths."""
    return sorted(rows, key=lambda row: int(row["index"]))


def _refuse_misspelled(keys: Iterable[str]) -> None:
    for key in keys:
        if key not in KNOWN and (near := get_close_matches(key.lower(), KNOWN, n=1, cutoff=_MISSPELLED)):
            raise InvalidArgumentError(
                f"The metadata has {key!r}, which no task looks for: did you mean {near[0]!r}? Tasks look for "
                f"{', '.join(KNOWN)}"
            )


def _tokenizer(metadata: Mapping[str, Any]) -> Any:
    own, model = (metadata.get(name) for name in ("tokenizer", "pretrained"))
    name = own or model
    if not name or not isinstance(name, str):
        raise InvalidArgumentError(
            "These prompts are made to a number of tokens, and nothing names a tokenizer: add it to the metadata, as "
            'in \'{"tokenizer": "HuggingFaceTB/SmolLM2-135M"}\', or pretrained=... to the model\'s arguments'
        )
    return _loaded(name, bool(own))


@lru_cache(maxsize=1)  # eleven tasks ask for the same, which takes seconds from a GGUF file
def _loaded(name: str, alone: bool) -> Any:
    if alone and Path(name).is_dir():  # without a model, which load_tokenizer looks for
        return AutoTokenizer.from_pretrained(name)
    return load_tokenizer(name)
