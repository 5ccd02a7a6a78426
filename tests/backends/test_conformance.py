"""Every backend that comes with memlong meets the whole contract.

One configuration of each is held to every clause, the others to those that an index may keep or break.
"""

from typing import ClassVar

import pytest

from memlong.bank import IndexRows, NoOptions, bank_of
from memlong.testing import MemoryBankTests
from memlong.testing.harness import another_configuration
from memlong_faiss.index import FaissIndex
from memlong_hnswlib.index import HnswlibIndex
from memlong_torch.index import DeviceMatrix, TorchIndex


class TestTorch(MemoryBankTests):
    index_class = TorchIndex
    exact = True


class TestFaissFlat(MemoryBankTests):
    index_class = FaissIndex
    recall_floor = 1.0


@another_configuration
class TestFaissHnsw(MemoryBankTests):
    index_class = FaissIndex
    options: ClassVar = {"index": "HNSW32"}


@another_configuration
class TestFaissIvf(MemoryBankTests):
    index_class = FaissIndex
    options: ClassVar = {"index": "IVF16,Flat", "train_size": 64, "nprobe": 12}


@another_configuration
class TestFaissIvfPq(MemoryBankTests):
    index_class = FaissIndex
    options: ClassVar = {"index": "IVF16,PQ8", "train_size": 256, "nprobe": 16}
    recall_floor = 0.6


class TestHnswlib(MemoryBankTests):
    index_class = HnswlibIndex
    options: ClassVar = {"initial_capacity": 8}


class MirroredTorchIndex(TorchIndex):
    """Searches a matrix of its own, as on a CUDA device, but on the CPU."""

    def __init__(self, rows: IndexRows, options: NoOptions) -> None:
        super().__init__(rows, options)
        self._mirror = DeviceMatrix(rows.dim, rows.device)
        self._norms = DeviceMatrix(1, rows.device) if rows.similarity == "l2" else None


@another_configuration
class TestTorchMirror(MemoryBankTests):
    index_class = MirroredTorchIndex
    exact = True
    fresh_process = False


@another_configuration
@pytest.mark.usefixtures("fake_gpu")
class TestFaissGpuLogicFlat(MemoryBankTests):
    """The code around FAISS-GPU, on an index of the CPU that can pass over nothing."""

    index_class = FaissIndex
    options: ClassVar = {"device": "cuda"}
    recall_floor = 1.0
    fresh_process = False


@another_configuration
@pytest.mark.usefixtures("fake_gpu")
class TestFaissGpuLogicIvf(MemoryBankTests):
    index_class = FaissIndex
    options: ClassVar = {"device": "cuda", "index": "IVF16,Flat", "train_size": 64, "nprobe": 12}
    fresh_process = False


def test_one_configuration_of_each_backend_is_held_to_every_clause():
    clauses = [name for name in dir(MemoryBankTests) if name.startswith("test_")]
    suites = [each for name, each in globals().items() if name.startswith("Test")]
    whole = {suite.bank_class for suite in suites if all(getattr(suite, clause) for clause in clauses)}
    assert whole == {bank_of(index) for index in (TorchIndex, FaissIndex, HnswlibIndex)}
