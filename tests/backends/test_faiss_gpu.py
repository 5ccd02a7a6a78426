"""FaissBank on a GPU meets the whole contract."""

from __future__ import annotations

from typing import ClassVar

import pytest

from memlong.testing import MemoryBankTests

pytestmark = pytest.mark.gpu
faiss = pytest.importorskip("faiss")

if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
    pytest.skip("FAISS has no GPU code or sees no GPU", allow_module_level=True)

from memlong.bank import bank_of  # noqa: E402 - its library first
from memlong_faiss.index import FaissIndex  # noqa: E402 - its library first

FaissBank = bank_of(FaissIndex)


class TestFaissGpuFlat(MemoryBankTests):
    index_class = FaissIndex
    options: ClassVar = {"device": "cuda"}
    recall_floor = 1.0


class TestFaissGpuIvf(MemoryBankTests):
    index_class = FaissIndex
    options: ClassVar = {"device": "cuda", "index": "IVF16,Flat", "train_size": 64, "nprobe": 12}
