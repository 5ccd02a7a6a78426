"""TorchBank on a CUDA device meets the whole contract."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from memlong.bank import bank_of
from memlong.testing import MemoryBankTests
from memlong_torch.index import TorchIndex

TorchBank = bank_of(TorchIndex)

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)


class TestTorchCuda(MemoryBankTests):
    index_class = TorchIndex
    options: ClassVar = {"device": "cuda"}
    exact = True


def test_both_devices_find_the_same(fill):
    vectors, queries = torch.randn(5000, 64), torch.randn(40, 64)
    banks = [TorchBank(64, device=device) for device in ("cpu", "cuda")]
    for bank in banks:
        fill(bank, vectors)
    on_cpu, on_gpu = (bank.search(queries, 10) for bank in banks)
    assert torch.equal(on_cpu.ids, on_gpu.ids)
    assert torch.equal(on_cpu.scores, on_gpu.scores)


def test_keys_and_values_stay_on_their_device():
    bank = TorchBank(8)
    keys = torch.randn(3, 2, 2, 4, 4, device="cuda", dtype=torch.bfloat16)
    bank.add(torch.randn(3, 8, device="cuda"), keys, keys * 2, [[0, 4], [4, 8], [8, 12]])
    got = bank.retrieve(torch.randn(2, 8, device="cuda"), 5)
    assert got.keys.device.type == got.values.device.type == "cuda"
    assert torch.equal(got.keys[:, :3], keys[got.ids[:, :3]])
    assert (got.keys[:, 3:] == 0).all()
