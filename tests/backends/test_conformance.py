"""Every backend that comes with memlong meets the whole contract."""

from typing import ClassVar

from memlong.testing import MemoryBankTests
from memlong_faiss.bank import FaissBank
from memlong_hnswlib.bank import HnswlibBank
from memlong_torch.bank import TorchBank


class TestTorch(MemoryBankTests):
    bank_class = TorchBank
    exact = True


class TestFaissFlat(MemoryBankTests):
    bank_class = FaissBank
    recall_floor = 1.0


class TestFaissHnsw(MemoryBankTests):
    bank_class = FaissBank
    options: ClassVar = {"index": "HNSW32"}


class TestFaissIvf(MemoryBankTests):
    bank_class = FaissBank
    options: ClassVar = {"index": "IVF16,Flat", "train_size": 64, "nprobe": 12}


class TestFaissIvfPq(MemoryBankTests):
    bank_class = FaissBank
    options: ClassVar = {"index": "IVF16,PQ8", "train_size": 256, "nprobe": 16}
    recall_floor = 0.6


class TestHnswlib(MemoryBankTests):
    bank_class = HnswlibBank
    options: ClassVar = {"initial_capacity": 8}
