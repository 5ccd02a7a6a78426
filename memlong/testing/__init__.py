"""What plugin authors test a memory bank with: subclass `MemoryBankTests` and name the class.

class TestMine(MemoryBankTests):
    bank_class = MyBank
    options = {"effort": 64}
    recall_floor = 0.9
"""

import pytest

_PARTS = (
    "search",
    "retrieval",
    "lifecycle",
    "capacity",
    "inputs",
    "faults",
    "threads",
    "persistence",
    "harness",
)
pytest.register_assert_rewrite(*(f"memlong.testing.{part}" for part in _PARTS))

from memlong.testing.suite import MemoryBankTests  # noqa: E402 -- after the rewriting of its asserts is set up

__all__ = ["MemoryBankTests"]
