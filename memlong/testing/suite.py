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
    """The whole contract of a memory bank; the docstring of each test states one clause.

    Attributes
    ----------
    index_class : type of Index
        The class under test; or set `bank_class`, a type of MemoryBank. One of the two is required.
    options : dict
        Options of every bank, such as an index's settings.
    recall_floor : float, default 0.95
        Minimum recall@10 among 600 random vectors of dimension 32, for searches and for the index's own candidates,
        without the bank's brute force.
    exact : bool, default False
        Whether the bank always finds the true best, and resolves ties in favor of the lowest ids.
    not_saved : collection of str, default ()
        Options that a snapshot must not contain: addresses, credentials, paths to write to.
    fresh_process : bool, default True
        Whether a fresh process can import the class by its name, and create a bank with these options.

    Notes
    -----
    Override `make` if a bank needs more setup, and use an `autouse` fixture for teardown. Override `index_bytes` if the
    library holds the index outside of Python and the bank does not save it.
    """
