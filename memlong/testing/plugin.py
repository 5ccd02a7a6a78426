"""The pytest plugin for authors of memlong plugins: ``pytest_plugins = ["memlong.testing.plugin"]`` in a conftest.py.

It brings the fixture `tiny_model`, registers the markers that the suites use, and has each failure of a suite say
which clause of the contract it is about. It is not loaded by itself: whoever has memlong installed need not want torch
in every test run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest

from memlong.testing import models
from memlong.testing.harness import Suite

MARKERS = (
    "gpu: needs a CUDA device; skips with a reason where there is none",
    "server: needs a server that the test starts",
    "slow: takes more than a few seconds",
)


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Name the clause in the report of a test that failed."""
    report = yield
    test: Any = getattr(item, "function", None)
    if report.failed and issubclass(getattr(item, "cls", None) or object, Suite) and test.__doc__:
        report.sections.append(("Clause of memlong's contract", " ".join(test.__doc__.split())))
    return report


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """`memlong.testing.tiny_model`, which makes tiny random models."""
    return models.tiny_model
