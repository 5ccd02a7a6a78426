"""Attention without a mask gives what attention with one gives, and is taken only where the two mean the same."""

from __future__ import annotations

import pytest
import torch

from memlong import MemoryDecoder
from memlong.decoder.model import kernels
from memlong.decoder.model.forward import AttentionPass
from memlong.testing import ARCHITECTURES

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
MODES = ["zero", "overlaid", "compressed", "before-window", "original"]


@pytest.fixture
def masked(monkeypatch):
    """Always with a mask: the reference."""

    def make():
        monkeypatch.setattr(AttentionPass, "sees_all", lambda *_, **__: False)

    return make


@pytest.fixture
def unmasked(monkeypatch):
    """Without one wherever that is right, as on a GPU; returns the calls that had none, as [queries, keys]."""

    def make():
        calls = []
        attend = kernels.attend_to_all_before

        def noted(query, key, value, scale):
            calls.append((query.shape[2], key.shape[2]))
            return attend(query, key, value, scale)

        monkeypatch.setattr(kernels, "attend_to_all_before", noted)
        monkeypatch.setattr(kernels, "prefers_no_mask", lambda _: True)
        return calls

    return make


def read(model, config, ids, mask=None):
    with MemoryDecoder(model, None, config) as decoder:
        return torch.cat([segment.logits for segment in decoder.stream(ids, mask)], dim=1)


def both(masked, unmasked, monkeypatch, run):
    with monkeypatch.context():
        masked()
        expected = run()
    monkeypatch.undo()
    calls = unmasked()
    return expected, run(), calls


def test_of_any_model(tiny_model, architecture, attention, small, text, masked, unmasked, monkeypatch):
    model, ids = tiny_model(architecture, attention), text(60)
    config = small(
        position_mode=MODES[(ARCHITECTURES.index(architecture) + (attention == "eager")) % len(MODES)]
    )
    expected, found, calls = both(masked, unmasked, monkeypatch, lambda: read(model, config, ids))
    torch.testing.assert_close(found, expected, **TOLERANCE)
    many = [keys for queries, keys in calls if queries > 1]
    assert bool(many) == (attention == "sdpa")
    assert not many or max(many) > 24 + 2  # memory is among them


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("position_mode", MODES)
@pytest.mark.parametrize("rows", ["alike", "ragged"])
def test_of_several_rows(
    tiny_model, attention, small, text, masked, unmasked, monkeypatch, position_mode, rows
):
    model, ids = tiny_model("Llama", attention), text(60, rows=3)
    lengths = [60, 60, 60] if rows == "alike" else [60, 41, 13]
    mask = torch.stack([(torch.arange(60) >= 60 - length).long() for length in lengths])
    config = small(position_mode=position_mode)
    expected, found, calls = both(masked, unmasked, monkeypatch, lambda: read(model, config, ids, mask))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **TOLERANCE)
    if rows == "alike" and attention == "sdpa":
        assert max(keys for queries, keys in calls if queries == 8) > 24 + 2  # memory is among them


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("position_mode", MODES)
@pytest.mark.parametrize("beams", [1, 3])
def test_of_what_is_generated(
    tiny_model, attention, small, text, masked, unmasked, monkeypatch, position_mode, beams
):
    model = tiny_model("Llama", attention)
    ids, prompt = text(60, rows=2), text(9, rows=2, seed=1)
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0

    def generate():
        with MemoryDecoder(model, None, small(position_mode=position_mode)) as decoder:
            decoder.read(ids)
            return decoder.generate(
                prompt,
                mask,
                max_new_tokens=12,
                num_beams=beams,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
            )

    expected, found, calls = both(masked, unmasked, monkeypatch, generate)
    assert torch.equal(found.sequences, expected.sequences)
    for score, reference in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(score, reference, **TOLERANCE)
    assert attention == "eager" or any(queries == 1 for queries, _ in calls)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gates_need_a_mask_and_layers_without_memory_do_not(
    tiny_model, attention, small, text, masked, unmasked, monkeypatch
):
    model, ids = tiny_model("Llama", attention), text(80)
    config = small(gate_init=-1.0, retrieval_layers="2-3")
    expected, found, calls = both(masked, unmasked, monkeypatch, lambda: read(model, config, ids))
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert all(keys <= 24 + 2 for _, keys in calls)
    assert bool(calls) == (attention == "sdpa")


def test_memory_that_lies_ahead_is_hidden(llama, small, text, masked, unmasked, monkeypatch):
    """With positions of their own, chunks of another text may stand behind the question."""
    config = small(position_mode="original", top_k=20)

    def ask():
        with MemoryDecoder(llama, None, config) as decoder:
            decoder.read(text(100))
            banks = decoder.banks
            decoder.reset(banks)
            return torch.cat([segment.logits for segment in decoder.stream(text(20, seed=1))], dim=1)

    expected, found, _ = both(masked, unmasked, monkeypatch, ask)
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("width", [12, 16, 100])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_padded_heads_attend_as_they_are(width, scale):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, width), torch.randn(2, 2, 9, width), torch.randn(2, 2, 9, width)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    mask = kernels.additive_mask(torch.rand(2, 5, 9) > 0.3, torch.float32)
    base = kernels.ALL_ATTENTION_FUNCTIONS["sdpa"]
    options = {"scaling": scale, "is_causal": False}
    expected, _ = base(module, query, key, value, mask, **options)
    found, _ = kernels.attend_padded(base, module, query, key, value, mask, options)
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_a_masks_rows_begin_where_kernels_can_read_them():
    mask = kernels.additive_mask(torch.ones(2, 5, 9, dtype=torch.bool), torch.float32)
    assert mask.shape == (2, 1, 5, 9)
    assert mask.stride(2) % 8 == 0
    assert not mask.any()


def test_kernels_are_chosen_on_cuda_alone_and_for_the_call_alone():
    def enabled():
        return torch.backends.cuda.cudnn_sdp_enabled()

    before = enabled()
    with kernels.steady_kernels(torch.device("cpu")):
        assert enabled() == before
    with kernels.steady_kernels(torch.device("cuda", 0)):
        assert not enabled()
    assert enabled() == before
