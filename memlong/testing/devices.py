"""The contract of devices: a bank computes on the device it was given."""

from __future__ import annotations

import pytest
import torch

from memlong.errors import DeviceUnavailableError
from memlong.testing.harness import BankSuite, assert_found, random_vectors


class DeviceTests(BankSuite):
    """What a bank does on a GPU."""

    @pytest.mark.gpu
    def test_a_gpu_finds_what_the_cpu_does(self) -> None:
        """If the backend supports "cuda", a bank on a GPU reaches the recall floor, with the same scores."""
        if "cuda" not in self.bank_class.index_class.devices:
            pytest.skip(
                f"{self.bank_class.__name__} computes on: {', '.join(self.bank_class.index_class.devices)}"
            )
        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")
        try:
            bank, _ = self.filled(600, device="cuda")
        except DeviceUnavailableError as error:
            pytest.skip(str(error))
        queries = random_vectors(50, seed=1)
        true, found = bank.exact_search(queries, 10), bank.search(queries, 10)
        assert bank.device.type == "cuda"
        recall = (found.scores >= true.scores[:, -1:]).float().mean().item()
        assert_found(recall, self.recall_floor, "a search finds")
