"""RULER (arXiv 2404.06654): lm-eval's own generators, given local text and the number of samples to make."""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from datasets import Dataset
from lm_eval.tasks.ruler import common_utils

from memlong.errors import InvalidArgumentError, MissingDependencyError
from memlong.lm_eval.tasks.given import Given, given_by, in_turn
from memlong.lm_eval.tasks.haystack import split, words_of

_PACKAGE = "lm_eval.tasks.ruler"
_PLAIN = "The grass is green, the sky is blue, and nothing in this sentence is unusual."


@dataclass(frozen=True)
class Generator:
    """Where lm-eval makes a task.

    Attributes
    ----------
    module
        A module of its RULER.
    dataset
        The function that makes a data set.
    samples
        The function that this calls for one length, with ``num_samples``.
    """

    module: str
    dataset: str
    samples: str


_NEEDLES = (
    *(f"niah_{kind}_{number}" for kind in ("single", "multikey") for number in (1, 2, 3)),
    "niah_multivalue",
    "niah_multiquery",
)
GENERATORS = {
    **{name: Generator("niah_utils", name, "generate_samples") for name in _NEEDLES},
    "vt": Generator("vt_utils", "get_vt_dataset", "sys_vartrack_w_noise_random"),
    "cwe": Generator("cwe_utils", "get_cw_dataset", "sys_word_pair_random"),
    "fwe": Generator("fwe_utils", "fwe_download", "sys_kwext"),
}
"""The tasks, without those that ask questions on documents."""


def dataset(*, ruler: str, **metadata: Any) -> dict[str, Dataset]:
    """Make the samples of a task, as a task's ``custom_dataset``.

    Parameters
    ----------
    ruler
        A name in `GENERATORS`.
    **metadata
        ``max_seq_lengths``, ``samples`` of each (500), ``seed`` (0), ``tokenizer`` or ``pretrained``, ``haystack``.

    Raises
    ------
    InvalidArgumentError, InvalidTextError, MissingDependencyError
        As `given_by` and `words_of` do.
    """
    given = given_by(metadata)
    if 2 * given.count(_PLAIN) > len(_PLAIN):  # lm-eval would shrink its shortest prompt forever
        raise InvalidArgumentError(
            "This tokenizer cuts text into nearly single characters, for which lm-eval's RULER makes no prompts: name "
            'another one in the metadata, as in \'{"tokenizer": "HuggingFaceTB/SmolLM2-135M"}\''
        )
    rows = [row for length in given.lengths for row in _samples(ruler, given, length)]
    return {"test": Dataset.from_list(in_turn(rows), split="test")}


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return the share of what was asked for that the answer holds, under the prompt's length."""
    length = str(doc["max_length"])
    return {length: common_utils.process_results(doc, results)[length]}


def _samples(name: str, given: Given, length: int) -> list[dict[str, Any]]:
    generator = GENERATORS[name]
    draw = given.draw(name, length)
    with _lent(generator, given, draw), _seeded(draw), redirect_stdout(io.StringIO()):
        make = getattr(_modules()[generator.module], generator.dataset)
        made: list[dict[str, Any]] = make(max_seq_lengths=[length], tokenizer="given")["test"].to_list()
    return made


@contextmanager
def _lent(generator: Generator, given: Given, draw: random.Random) -> Iterator[None]:
    """Lend lm-eval's generator what it would download, and the number of samples."""
    module = _modules()[generator.module]
    make = getattr(module, generator.samples)

    def samples(*arguments: Any, num_samples: int = 500, **options: Any) -> Any:
        wanted = given.samples if num_samples > 1 else 1  # one is the worked example of a prompt
        return make(*arguments, num_samples=wanted, **options)

    members: dict[str, Any] = {generator.samples: samples, "get_tokenizer": lambda _name: given.tokenizer}
    if hasattr(module, "RNG"):
        members["RNG"] = draw
    if hasattr(module, "get_haystack"):
        members["get_haystack"] = _haystack(module.get_haystack, given)
    sentences = lru_cache(maxsize=4)(split)  # samples of a length have the same text
    with (
        _replaced(module, members),
        _replaced(_modules()["prepare_niah"], {"cached_sent_tokenize": sentences}),
    ):
        yield


def _haystack(theirs: Callable[..., Any], given: Given) -> Callable[[str], Any]:
    def haystack(type_haystack: str) -> Any:
        return words_of(given) if type_haystack == "essay" else theirs(type_haystack=type_haystack)

    return haystack


@cache
def _modules() -> dict[str, ModuleType]:
    """Import lm-eval's modules without the download that an import of them begins.

    Those that would have begun it are then hidden again, as lm-eval's own tasks do need what it brings.
    """
    names = ("prepare_niah", *sorted({each.module for each in GENERATORS.values()}))
    known = set(sys.modules)
    try:
        import nltk

        with redirect_stdout(io.StringIO()), _replaced(nltk, {"download": lambda *_args, **_options: False}):
            return {name: import_module(f"{_PACKAGE}.{name}") for name in names}
    except ImportError as error:
        raise MissingDependencyError(
            f"RULER needs packages that are not installed ({error}): pip install 'memlong[lm-eval]'"
        ) from error
    finally:
        for each in {f"{_PACKAGE}.{name}" for name in ("prepare_niah", "niah_utils")} - known:
            sys.modules.pop(each, None)


@contextmanager
def _seeded(draw: random.Random) -> Iterator[None]:
    """Let the generators, which draw from what is global, draw the same each time."""
    before, before_numpy = random.getstate(), np.random.get_state()
    random.seed(draw.getrandbits(32))
    np.random.seed(draw.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)


@contextmanager
def _replaced(module: ModuleType, members: Mapping[str, Any]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in members}
    vars(module).update(members)
    try:
        yield
    finally:
        vars(module).update(before)
