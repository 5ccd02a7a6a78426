"""The eight oracles where the model and the index are on one device, in float32 and bfloat16; CUDA by the marker gpu.

The other files hold the oracles in full, on the CPU. Here each stands once, for what a device can get wrong.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memlong import MemoryDecoder

NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far apart numbers may be that were computed in another order, relative to their length."""

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    ],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request, device, tiny_model):
    return tiny_model().to(device, request.param)


@pytest.fixture(params=["torch", "faiss"])
def settings(request, device, small):
    """Of a memory whose index computes on the device, and exactly."""
    options = {"device": device} if request.param == "torch" else {"device": device, "index": "Flat"}
    if device == "cuda" and request.param == "faiss":
        faiss = pytest.importorskip("faiss")
        if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
            pytest.skip("FAISS has no GPU code or sees no GPU")

    def make(**changes):
        changes["backend_options"] = {**options, **changes.get("backend_options", {})}
        return small(backend=request.param, **changes)

    return make


def assert_near(found, expected):
    length = expected.float().norm()
    assert (found.float() - expected.float()).norm() <= NEAR[expected.dtype] * length


def stream(decoder, ids, mask=None):
    """Logits of every row's tokens, and the ids that each row retrieved, segment by segment."""
    logits, found = [[] for _ in ids], [[] for _ in ids]
    for segment in decoder.stream(ids, mask):
        for row in range(len(ids)):
            logits[row].append(segment.logits[row][segment.tokens[row] >= 0])
            retrieval = segment.retrievals[row]
            found[row].append(None if retrieval is None else retrieval.ids.tolist())
    return [torch.cat(each) for each in logits], found


def test_1_off_means_off(model, settings, text):
    ids = text(30, rows=2).to(model.device)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        with MemoryDecoder(model, None, settings()):
            during = model(ids, attention_mask=mask).logits
            answer = model.generate(ids, attention_mask=mask, max_new_tokens=8, num_beams=2, do_sample=False)
        after = model(ids, attention_mask=mask).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=8, num_beams=2, do_sample=False)
    assert torch.equal(answer, plain)


def test_2_memory_of_the_whole_prefix_is_full_attention(model, settings, text):
    ids = text(150).to(model.device)
    with MemoryDecoder(model, None, settings(position_mode="original", top_k=64)) as decoder:
        (found,), _ = stream(decoder, ids)
    with torch.no_grad():
        plain = model(ids).logits[0]
        if model.dtype == torch.float32:
            assert_near(found, plain)
            return
        exact = model.float()(ids).logits[0]
    # In fewer bits both are off, and memory, whose keys are rotated twice, hardly more.
    assert (found - exact).norm() <= 1.5 * (plain - exact).norm()


def test_3_a_token_changes_nothing_before_it(model, settings, text):
    ids = text(90).to(model.device)
    other = ids.clone()
    other[0, 50] = (other[0, 50] + 5) % 90 + 3
    with MemoryDecoder(model, None, settings()) as decoder:
        (logits,), (found,) = stream(decoder, ids)
        decoder.reset()
        (other_logits,), (other_found,) = stream(decoder, other)
    assert_near(other_logits[:50], logits[:50])
    assert not torch.allclose(other_logits[50:].float(), logits[50:].float())
    segments = 50 // 8 + 1
    assert other_found[:segments] == found[:segments]


def test_4_rows_are_alone(model, settings, text):
    ids = text(100, rows=3).to(model.device)
    lengths = (100, 61, 13)
    mask = torch.stack([(torch.arange(100) >= 100 - length).long() for length in lengths]).to(model.device)
    with MemoryDecoder(model, None, settings()) as decoder:
        together, retrieved = stream(decoder, ids, mask)
        for row, length in enumerate(lengths):
            decoder.reset()
            (alone,), (found,) = stream(decoder, ids[row : row + 1, 100 - length :])
            assert_near(together[row], alone)
            assert [each for each in retrieved[row] if each] == [each for each in found if each]


def test_5_a_flat_index_finds_what_brute_force_does(model, settings, text):
    with MemoryDecoder(model, None, settings()) as decoder:
        decoder.read(text(300).to(model.device))
        (bank,) = decoder.banks
        queries = bank.embeddings.embeddings + 0.01
        found, exact = bank.search(queries, 5), bank.exact_search(queries, 5)
        assert bank.device.type == model.device.type
    assert torch.equal(found.ids, exact.ids)
    assert torch.equal(found.scores, exact.scores)


def test_6_a_saved_stream_goes_on(model, settings, text, tmp_path):
    first, more = text(101).to(model.device), text(60, seed=1).to(model.device)
    decoder = MemoryDecoder(model, None, settings())
    with decoder:
        decoder.read(first)
    decoder.save(tmp_path)
    found = []
    for each in (decoder, MemoryDecoder.load(tmp_path, model, None, settings())):
        with each:
            found.append(stream(each, more))
    (one, ids), (other, other_ids) = found
    assert torch.equal(one[0], other[0])
    assert ids == other_ids


@pytest.mark.parametrize("eviction", ["fifo", "lru", "retrieval_frequency"])
def test_7_what_leaves_is_what_leaves_a_bank_on_the_cpu(model, settings, text, eviction):
    limits = {"max_chunks": 7, "eviction": eviction}
    here = settings(backend_options=limits)
    there = replace(here, backend="torch", backend_options={**limits, "device": "cpu"})
    ids = text(200).to(model.device)
    held, retrieved = [], []
    for config in (here, there):
        with MemoryDecoder(model, None, config) as decoder:
            retrieved.append(stream(decoder, ids)[1])
            held.append(decoder.banks[0].ids.tolist())
    assert held[0] == held[1]
    assert len(held[0]) <= 7
    assert retrieved[0] == retrieved[1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_8_the_same_text_is_met_alike_however_far_it_stands(device, dtype, settings, text):
    # In one layer K-V depend on tokens alone: the same chunks and the same window give the same logits.
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, num_hidden_layers=1, pad_token_id=0, **shape)).eval()
    verse = text(32)
    ids = torch.cat([text(2, seed=1), verse.repeat(1, 60)], dim=1).to(device)
    with MemoryDecoder(model.to(device, dtype), None, settings(retriever="recent")) as decoder:
        (logits,), _ = stream(decoder, ids)
    assert_near(logits[1792:1824], logits[256:288])
