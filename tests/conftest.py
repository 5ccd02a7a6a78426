"""Tiny random models of several architectures, and banks of every backend."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, islice
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from memlong import MemoryConfig
from memlong.testing import ARCHITECTURES, VOCABULARY

pytest_plugins = ["memlong.testing.plugin"]

BACKENDS: dict[str, dict[str, Any]] = {"torch": {}, "faiss": {"index": "Flat"}, "hnswlib": {"ef": 200}}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--brief",
        action="store_true",
        help="of tests of many models take as many cases as show every value of their parameters once",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave of each test that is marked `pairwise` enough cases to see every two values of its parameters together.

    With --brief, of these and of all that go through the architectures, enough to see every value.
    """
    brief = config.getoption("--brief")
    products: dict[str, list[pytest.Item]] = {}
    for item in items:
        of_models = brief and "architecture" in getattr(item, "fixturenames", ())
        if of_models or item.get_closest_marker("pairwise"):
            products.setdefault(item.nodeid.partition("[")[0], []).append(item)
    spare = {id(item) for product in products.values() for item in product}
    for product in products.values():
        rows = covering([_values(item) for item in product], together=1 if brief else 2)
        spare.difference_update(id(product[row]) for row in rows)
    items[:] = [item for item in items if id(item) not in spare]
    if hasattr(config, "workerinput"):
        items[:] = _shared_out(items, config.workerinput["workercount"])


def _shared_out(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """Order the tests so that each worker, which gets as many in a row as another, begins with its share of slow ones.

    Else one worker has nearly all of them, and is alone with them in the end.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    fast = iter([item for item in items if not item.get_closest_marker("slow")])
    ordered: list[pytest.Item] = []
    for worker in range(workers):
        share = slow[worker::workers]
        count = len(items) * (worker + 1) // workers - len(ordered) - len(share)
        ordered += [*share, *islice(fast, max(count, 0))]
    return [*ordered, *fast]


def _values(item: pytest.Item) -> tuple[tuple[str, str], ...]:
    return tuple((name, repr(value)) for name, value in sorted(item.callspec.params.items()))


def covering(cases: list[tuple[tuple[str, str], ...]], *, together: int) -> list[int]:
    """Which of these cases hold all that any of them has of so many values together.

    The next is always the one that adds the most.
    """
    held = [set(combinations(case, together)) or {case} for case in cases]
    missing, chosen = set().union(*held), []
    while missing:
        chosen.append(max(range(len(cases)), key=lambda row: len(held[row] & missing)))
        missing -= held[chosen[-1]]
    return chosen


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def llama(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model()


@pytest.fixture
def small() -> Callable[..., MemoryConfig]:
    """Sizes small enough that a few hundred tokens make many chunks."""

    def make(**changes: Any) -> MemoryConfig:
        settings: dict[str, Any] = {
            "backend": "torch",
            "retriever": "lm",
            "chunk_size": 4,
            "top_k": 3,
            "local_window": 24,
            "sink_tokens": 2,
            "segment_size": 8,
        }
        settings.update(changes)
        settings.setdefault("backend_options", BACKENDS.get(settings["backend"] or "", {}))
        return MemoryConfig(**settings)

    return make


@pytest.fixture
def text() -> Callable[..., torch.Tensor]:
    """Random token ids [rows, tokens] that hold no special token."""

    def make(tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)

    return make
