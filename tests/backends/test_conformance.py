"""Every backend that comes with memlong meets the whole contract.

One configuration of each is held to every clause, the others to those that an index may keep or break.
"""

from typing import Any, ClassVar

import pytest

from memlong.testing import MemoryBankTests
from memlong.testing.harness import another_configuration
from memlong_faiss.bank import FaissBank
from memlong_hnswlib.bank import HnswlibBank
from memlong_torch.bank import DeviceMatrix, TorchBank


class TestTorch(MemoryBankTests):
    bank_class = TorchBank
    exact = True


class TestFaissFlat(MemoryBankTests):
    bank_class = FaissBank
    recall_floor = 1.0


@another_configuration
class TestFaissHnsw(MemoryBankTests):
    bank_class = FaissBank
    options: ClassVar = {"index": "HNSW32"}


@another_configuration
class TestFaissIvf(MemoryBankTests):
    bank_class = FaissBank
    options: ClassVar = {"index": "IVF16,Flat", "train_size": 64, "nprobe": 12}


@another_configuration
class TestFaissIvfPq(MemoryBankTests):
    bank_class = FaissBank
    options: ClassVar = {"index": "IVF16,PQ8", "train_size": 256, "nprobe": 16}
    recall_floor = 0.6


class TestHnswlib(MemoryBankTests):
    bank_class = HnswlibBank
    options: ClassVar = {"initial_capacity": 8}


class MirroredTorchBank(TorchBank):
    """Searches a matrix of its own, as on a CUDA device, but on the CPU."""

    def __init__(self, dim: int, **bank_options: Any) -> None:
        super().__init__(dim, **bank_options)
        self._mirror = DeviceMatrix(dim, self.device)
        self._norms = DeviceMatrix(1, self.device) if self.metric == "l2" else None


@another_configuration
class TestTorchMirror(MemoryBankTests):
    bank_class = MirroredTorchBank
    exact = True
    fresh_process = False


@another_configuration
@pytest.mark.usefixtures("fake_gpu")
class TestFaissGpuLogicFlat(MemoryBankTests):
    """The code around FAISS-GPU, on an index of the CPU that can pass over nothing."""

    bank_class = FaissBank
    options: ClassVar = {"device": "cuda"}
    recall_floor = 1.0
    fresh_process = False


@another_configuration
@pytest.mark.usefixtures("fake_gpu")
class TestFaissGpuLogicIvf(MemoryBankTests):
    bank_class = FaissBank
    options: ClassVar = {"device": "cuda", "index": "IVF16,Flat", "train_size": 64, "nprobe": 12}
    fresh_process = False


def test_one_configuration_of_each_backend_is_held_to_every_clause():
    clauses = [name for name in dir(MemoryBankTests) if name.startswith("test_")]
    suites = [each for name, each in globals().items() if name.startswith("Test")]
    whole = {suite.bank_class for suite in suites if all(getattr(suite, clause) for clause in clauses)}
    assert whole == {TorchBank, FaissBank, HnswlibBank}
