"""Streaming on a CUDA device, against the CPU; the oracles there are in test_oracles_on_devices.py."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from memlong import MemoryDecoder
from memlong.decoder.overlap import SideStream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("device", ["cpu", "cuda"], ids=["bank on cpu", "bank on cuda"])
def test_streaming_on_cuda_gives_what_the_cpu_gives(tiny_model, architecture, attention, small, text, device):
    ids = text(150, rows=2)
    with MemoryDecoder(tiny_model(architecture, attention), None, small()) as decoder:
        expected = decoder.read(ids)
    model = tiny_model(architecture, attention).to("cuda")
    with MemoryDecoder(model, None, small(backend_options={"device": device})) as decoder:
        found = decoder.read(ids.to("cuda"))
    torch.testing.assert_close(found.cpu(), expected, rtol=0.0, atol=1e-3)


def test_memory_that_comes_late_is_waited_for(tiny_model, small, text, monkeypatch):
    settings = {"store": {"host": "all"}, "retrieval_layers": "2-3"}
    ids = text(150)
    with MemoryDecoder(tiny_model("Llama"), None, small(**settings)) as decoder:
        expected = decoder.read(ids)
    beside = SideStream.beside

    @contextmanager
    def slowly(stream):
        with beside(stream):
            torch.cuda._sleep(50_000_000)  # some 30 ms, in which the lower layers are long done
            yield

    monkeypatch.setattr(SideStream, "beside", slowly)
    with MemoryDecoder(tiny_model("Llama").to("cuda"), None, small(**settings)) as decoder:
        torch.testing.assert_close(decoder.read(ids.to("cuda")).cpu(), expected, rtol=0.0, atol=1e-3)
