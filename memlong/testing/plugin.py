"""The pytest plugin for authors of memlong plugins: ``pytest_plugins = ["memlong.testing.plugin"]`` in a conftest.py.

It provides the fixture `tiny_model`, registers the markers of the suites, and adds the contract clause to the report of
each failure. It is not loaded automatically, as not everyone with memlong installed wants torch in every test run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest

from memlong.testing import models
from memlong.testing.harness import Suite

MARKERS = (
    "gpu: needs a CUDA device; skipped with a reason otherwise",
    "server: needs a server that the test starts",
    "slow: takes more than a few seconds",
)


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the contract clause to the report of a failed test."""
    report = yield
    test: Any = getattr(item, "function", None)
    if report.failed and issubclass(getattr(item, "cls", None) or object, Suite) and test.__doc__:
        report.sections.append(("Clause of memlong's contract", " ".join(test.__doc__.split())))
    return report


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """Return `memlong.testing.tiny_model`, which builds tiny random models."""
    return models.tiny_model
