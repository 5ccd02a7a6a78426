"""The suite, subclassed for each of the wrong banks; run by test_wrong_banks.py."""

import wrong_banks
import wrong_indexes

from memlong.testing import MemoryBankTests

pytest_plugins = ["memlong.testing.plugin"]

for _bank in (*wrong_banks.WRONG, *wrong_indexes.WRONG, wrong_indexes.RightIndex):
    _settings = {"bank_class": _bank, "exact": True, "fresh_process": False}
    globals()[f"Test{_bank.__name__}"] = type(f"Test{_bank.__name__}", (MemoryBankTests,), _settings)
