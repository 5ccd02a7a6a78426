"""The eight oracles where model and index are on one device, for each kernel of attention; CUDA by the marker gpu.

The other files hold the oracles in full, on the CPU. Here each stands once, for what a device can get wrong. The width
of a head decides which kernel torch takes: models have 64 and 128, small ones 16, and 100 is no multiple of 8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memlong import MemoryDecoder

NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far apart numbers may be that were computed in another order, relative to their length."""


@dataclass(frozen=True)
class Case:
    """A width of heads, a dtype and a backend; and the device of both model and index."""

    head_dim: int
    dtype: torch.dtype
    backend: str
    device: str = "cpu"

    @property
    def name(self):
        return f"{self.device}-{self.head_dim}-{str(self.dtype).removeprefix('torch.')}-{self.backend}"


# Each width comes with each dtype and each backend, and each dtype with each backend; half of them have each width.
HALF = (
    Case(16, torch.float32, "torch"),
    Case(64, torch.bfloat16, "faiss"),
    Case(100, torch.float32, "faiss"),
    Case(128, torch.bfloat16, "torch"),
)
OTHER_HALF = (
    Case(16, torch.bfloat16, "faiss"),
    Case(64, torch.float32, "torch"),
    Case(100, torch.bfloat16, "torch"),
    Case(128, torch.float32, "faiss"),
)
ALL = HALF + OTHER_HALF


def on_devices(on_cpu):
    """Run an oracle for these cases on the CPU, and for all of them on CUDA."""
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=case.name) for case in on_cpu] + [on_cuda(case, id="") for case in ALL]
    )


def on_cuda(case, *others, id):  # noqa: A002 - as pytest calls it
    """The same case on CUDA, as a parameter that is marked so."""
    case = replace(case, device="cuda")
    no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
    return pytest.param(case, *others, id=f"{case.name}{id}", marks=[pytest.mark.gpu, no_cuda])


def llama(case, layers=4):
    """A tiny Llama whose heads are as wide as the case has them, two of them to a head of K-V."""
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(num_hidden_layers=layers, head_dim=case.head_dim, **shape, **ids)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # attention of a usual start is nearly flat
                parameter.normal_(std=0.15 * (48 / parameter.shape[1]) ** 0.5)
    return model.to(case.device, case.dtype)


@pytest.fixture
def model(case):
    return llama(case)


@pytest.fixture
def settings(case, small):
    """Of a memory whose index computes on the device, and exactly."""
    options = {"device": case.device}
    if case.backend == "faiss":
        faiss = pytest.importorskip("faiss")
        options["index"] = "Flat"
        if case.device == "cuda" and not (hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus()):
            pytest.skip("FAISS has no GPU code or sees no GPU")

    def make(**changes):
        changes["backend_options"] = {**options, **changes.get("backend_options", {})}
        return small(backend=case.backend, **changes)

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


@on_devices(OTHER_HALF)
def test_1_off_means_off(model, settings, text):
    ids = text(30, rows=2).to(model.device)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        with MemoryDecoder(model, None, settings()):
            during = model(ids, attention_mask=mask).logits
            with pytest.warns(UserWarning, match="does not use the attached memory"):
                answer = model.generate(
                    ids, attention_mask=mask, max_new_tokens=8, num_beams=2, do_sample=False
                )
        after = model(ids, attention_mask=mask).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=8, num_beams=2, do_sample=False)
    assert torch.equal(answer, plain)


@on_devices(ALL)
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


@on_devices(OTHER_HALF)
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


@on_devices(ALL)
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


@on_devices(HALF)
def test_5_a_flat_index_finds_what_brute_force_does(model, settings, text):
    with MemoryDecoder(model, None, settings()) as decoder:
        decoder.read(text(300).to(model.device))
        (bank,) = decoder.banks
        queries = bank.embeddings.embeddings + 0.01
        found, exact = bank.search(queries, 5), bank.exact_search(queries, 5)
        assert bank.device.type == model.device.type
    assert torch.equal(found.ids, exact.ids)
    assert torch.equal(found.scores, exact.scores)


@on_devices(HALF)
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


EVICTIONS = {"fifo": HALF[:2], "lru": HALF[2:], "retrieval_frequency": OTHER_HALF[:2]}
"""On the CPU, each policy comes with each dtype and each backend."""


@pytest.mark.parametrize(
    ("case", "eviction"),
    [
        pytest.param(case, policy, id=f"{case.name}-{policy}")
        for policy, cases in EVICTIONS.items()
        for case in cases
    ]
    + [on_cuda(case, policy, id=f"-{policy}") for policy in EVICTIONS for case in ALL],
)
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
@on_devices(HALF)
def test_8_the_same_text_is_met_alike_however_far_it_stands(case, settings, text):
    # In one layer K-V depend on tokens alone: the same chunks and the same window give the same logits.
    verse = text(32)
    ids = torch.cat([text(2, seed=1), verse.repeat(1, 60)], dim=1).to(case.device)
    with MemoryDecoder(llama(case, layers=1), None, settings(retriever="recent")) as decoder:
        (logits,), _ = stream(decoder, ids)
    assert_near(logits[1792:1824], logits[256:288])
