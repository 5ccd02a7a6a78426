"""Gates learn whatever kernel torch would rather take: what the forward pass took, the backward pass takes too."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from memlong import MemoryDecoder
from memlong.training import TrainingConfig
from memlong.training.documents import Episode
from memlong.training.loss import Batch, segment_loss


class Names(TorchDispatchMode):
    """Keeps the names of the operations that it sees."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.found.add(operation._schema.name)
        return operation(*args, **(kwargs or {}))


FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_the_forward_pass_chooses_the_kernel_of_the_backward_pass(kernel):
    # The trainer's backward pass runs when the kernels are no longer chosen for the model's call.
    query, key, value = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    other = SDPBackend.MATH if kernel == SDPBackend.FLASH_ATTENTION else SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(kernel):
        output = scaled_dot_product_attention(query, key, value)
    with sdpa_kernel(other), Names() as names:
        output.sum().backward()
    assert (f"{FUSED}_backward" in names.found) == (kernel == SDPBackend.FLASH_ATTENTION)


def test_gates_learn_the_same_under_every_kernel(llama, small, text):
    ids = text(48, rows=2)
    gradients = {}
    for kernels in (
        [SDPBackend.MATH],
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    ):
        decoder = MemoryDecoder(llama, None, small(gate_init=-1.0))
        decoder.model.requires_grad_(False)
        batch = Batch.of([Episode(each) for each in list(ids)], 5, ids.device)
        with decoder, sdpa_kernel(kernels):
            for segment in decoder.stream(batch.input_ids, batch.mask, gradients=True):
                loss = segment_loss(segment, batch, TrainingConfig(long_range_weight=0.0)).mean
                if loss.requires_grad:
                    loss.backward()
        gradients[len(kernels)] = [parameter.grad.clone() for parameter in decoder.gates.parameters()]
        assert all(each.abs().sum() > 0 for each in gradients[len(kernels)])
    for one, other in zip(gradients[1], gradients[3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
