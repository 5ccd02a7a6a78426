"""Test tools for plugin authors: suites for the whole contract, tiny models, and a pytest plugin.

class TestBank(MemoryBankTests):  # the class: metrics, dtypes, options, eviction, snapshots, growth, threads, recall
    index_class = MyIndex
    options = {"effort": 64}
    recall_floor = 0.9


class TestPlugin(BackendPluginTests):  # the plugin: listing, creation by name, use by a model
    backend = "mine"

In a conftest.py, ``pytest_plugins = ["memlong.testing.plugin"]`` adds fixtures and markers, and shows the contract
clause that a failed test checks. Names in ``__all__`` are public. `CONTRACT` is incremented whenever a backend that
passed may fail.
"""

import pytest

_PARTS = (
    "search",
    "retrieval",
    "lifecycle",
    "capacity",
    "inputs",
    "faults",
    "index",
    "threads",
    "persistence",
    "options",
    "devices",
    "harness",
    "backend",
)
pytest.register_assert_rewrite(*(f"memlong.testing.{part}" for part in _PARTS))

from memlong.testing.backend import BackendPluginTests  # noqa: E402 -- after the rewriting of asserts is set up
from memlong.testing.models import ARCHITECTURES, VOCABULARY, tiny_model  # noqa: E402
from memlong.testing.suite import MemoryBankTests  # noqa: E402

CONTRACT = 3
"""Version of the contract that the suites test."""

__all__ = ["ARCHITECTURES", "CONTRACT", "VOCABULARY", "BackendPluginTests", "MemoryBankTests", "tiny_model"]
