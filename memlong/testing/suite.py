"""The whole contract of a memory bank as one test class."""

from __future__ import annotations

from memlong.testing.capacity import CapacityTests
from memlong.testing.devices import DeviceTests
from memlong.testing.faults import FaultTests
from memlong.testing.index import IndexTests
from memlong.testing.inputs import InputTests
from memlong.testing.lifecycle import LifecycleTests
from memlong.testing.options import OptionTests
from memlong.testing.persistence import PersistenceTests
from memlong.testing.retrieval import RetrievalTests
from memlong.testing.search import SearchTests
from memlong.testing.threads import ThreadTests


class MemoryBankTests(
    SearchTests,
    IndexTests,
    RetrievalTests,
    LifecycleTests,
    CapacityTests,
    InputTests,
    FaultTests,
    ThreadTests,
    PersistenceTests,
    OptionTests,
    DeviceTests,
):
    """Every clause of the contract of a memory bank; each test's docstring states one.

    Attributes
    ----------
    bank_class : type of MemoryBank
        The class under test; it must be given.
    options : dict
        Keyword options for every bank made, such as an index's settings.
    recall_floor : float, default 0.95
        The least share of the true best ten that searches must find among 600 random vectors of 32 numbers, and that
        the index must name by itself, without the base's brute force.
    exact : bool, default False
        The bank always finds the true best, and keeps the lowest ids among equal scores.
    not_saved : collection of str, default ()
        Options that a snapshot must not hold: addresses, credentials, places to write to.
    fresh_process : bool, default True
        A fresh process can import the class by its name, and make a bank with these options.

    Notes
    -----
    Override `make` if a bank takes more to set up; use a fixture with `autouse` if it takes tearing down. Override
    `index_bytes` if the library holds the index where Python does not see it and the bank saves none.
    """
