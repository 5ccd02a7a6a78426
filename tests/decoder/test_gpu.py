"""Streaming on a CUDA device, against the CPU; the oracles there are in test_oracles_on_devices.py."""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from memlong import MemoryDecoder
from memlong.decoder.kv.copy_stream import CopyStream

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
    active = CopyStream.active

    @contextmanager
    def slowly(stream):
        with active(stream):
            torch.cuda._sleep(50_000_000)  # some 30 ms, in which the lower layers are long done
            yield

    monkeypatch.setattr(CopyStream, "active", slowly)
    with MemoryDecoder(tiny_model("Llama").to("cuda"), None, small(**settings)) as decoder:
        torch.testing.assert_close(decoder.read(ids.to("cuda")).cpu(), expected, rtol=0.0, atol=1e-3)


@contextmanager
def waits():
    """Count where the host waits for the device, by file and line; what transformers itself waits for is left out."""
    places = Counter()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = [
        f"{each.filename}:{each.lineno}" for each in seen if "called a synchronizing" in str(each.message)
    ]
    places.update(line for line in lines if "/transformers/" not in line)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def cuda_llama(request, tiny_model):
    return tiny_model("Qwen3").to("cuda", request.param)  # its heads are 16 wide, which all kernels take


def test_waits_are_seen():
    numbers = torch.ones(3, device="cuda")
    with waits() as found:
        numbers.sum().item()
        numbers.nonzero()
    assert sum(found.values()) >= 2
    assert torch.cuda.get_sync_debug_mode() == 0


def test_the_host_does_not_wait_within_a_segment(cuda_llama, small, text):
    ids = text(104)
    with MemoryDecoder(cuda_llama, None, small()) as decoder:
        decoder.read(ids[:, :97])  # a segment's first token: it has stored, retrieved, and made room
        with waits() as found:
            for at in range(97, 104):
                decoder.read(ids[:, at : at + 1])
    assert not found


def test_the_host_does_not_wait_in_a_segment_with_nothing_to_store(cuda_llama, small, text):
    ids = text(24, rows=2)
    with MemoryDecoder(cuda_llama, None, small()) as decoder:
        decoder.read(ids[:, :8])
        with waits() as found:
            decoder.read(ids[:, 8:16])
            decoder.read(ids[:, 16:24])
    assert not found


def test_generating_a_token_waits_for_the_token_alone(cuda_llama, small, text):
    ids = text(97).to("cuda")
    prompt = ids[:, :1]
    counts = {}
    with MemoryDecoder(cuda_llama, None, small()) as decoder:
        decoder.read(ids)
        for new in (6, 6, 5):  # the first time for what is done once; all of them end within a segment
            options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "remember": False}
            with waits() as found:
                decoder.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            counts[new] = found
    assert (counts[6] - counts[5]).total() <= 1


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # that is what it is about
def test_a_prompt_on_the_host_is_continued(cuda_llama, small, text):
    options = {"max_new_tokens": 6, "do_sample": False, "remember": False}
    with MemoryDecoder(cuda_llama, None, small()) as decoder:
        decoder.read(text(97))
        found = decoder.generate(text(9, seed=1), **options)
        assert torch.equal(found.cpu(), decoder.generate(text(9, seed=1).to("cuda"), **options).cpu())
