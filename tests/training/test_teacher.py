"""What full attention teaches: its own predictions, without adapters, and the divergence from them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import BambaConfig, BambaForCausalLM

from memlong import MemoryDecoder
from memlong.training.teacher import Lesson


def test_a_lesson_is_what_the_plain_model_predicts(trainer, text):
    run = trainer()
    model = run.decoder.model
    ids = text(80, rows=2)
    model.disable_adapters()
    with torch.no_grad():
        wanted = model(ids).logits.float()
    model.enable_adapters()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    lesson = Lesson.of(run.decoder, ids)
    losses = cross_entropy(wanted[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, -1)
    torch.testing.assert_close(lesson.losses[:, :-1], losses, rtol=1e-4, atol=1e-5)
    assert not lesson.losses[:, -1].any()
    best = wanted.log_softmax(-1).topk(lesson.ids.shape[-1])
    torch.testing.assert_close(lesson.log_probs, best.values, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, wanted)  # the adapters are back


def test_after_a_lesson_no_more_learns_than_before(trainer, text):
    run = trainer(warmup_stage_steps=2)
    run._parts.learn(lower_layers=False)
    model = run.decoder.model
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(learning) < len(run._parts.parameters)
    Lesson.of(run.decoder, text(20))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == learning


def test_long_texts_are_read_piece_by_piece(trainer, text, monkeypatch):
    run = trainer()
    ids = text(80)
    whole = Lesson.of(run.decoder, ids)
    monkeypatch.setattr("memlong.training.teacher._PIECE", 7)
    pieces = Lesson.of(run.decoder, ids)
    torch.testing.assert_close(pieces.log_probs, whole.log_probs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pieces.losses, whole.losses, rtol=1e-4, atol=1e-5)


def test_a_model_with_states_reads_all_at_once(small, text, monkeypatch):
    """transformers' Bamba gives other logits if it continues from its states with several tokens."""
    sizes = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 8, "mamba_n_groups": 1}
    config = BambaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_indices=[1],
        mamba_chunk_size=16,
        **sizes,
    )
    model = BambaForCausalLM(config).eval()
    decoder = MemoryDecoder(model, None, small(backend=None))
    monkeypatch.setattr("memlong.training.teacher._PIECE", 7)
    ids = text(40, rows=2)
    with torch.no_grad():
        wanted = cross_entropy(
            model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
    torch.testing.assert_close(Lesson.of(decoder, ids).losses[:, :-1].flatten(), wanted)


def test_what_is_frozen_stays_so(trainer, text):
    """With a stage of lower layers, these learn in that stage alone."""
    run = trainer(warmup_stage_steps=1)
    run._parts.learn(lower_layers=False)
    before = {name: parameter.requires_grad for name, parameter in run.decoder.model.named_parameters()}
    assert any(before.values())
    assert not all(learns for name, learns in before.items() if ".lora_" in name)
    Lesson.of(run.decoder, text(20))
    assert {n: parameter.requires_grad for n, parameter in run.decoder.model.named_parameters()} == before


@pytest.mark.parametrize("kept", [97, 20])
def test_the_divergence_is_that_of_the_distributions(kept):
    torch.manual_seed(0)
    theirs, ours = torch.randn(2, 5, 97), torch.randn(2, 5, 97, requires_grad=True)
    best = theirs.log_softmax(-1).topk(kept)
    lesson = Lesson(best.indices, best.values, torch.zeros(2, 5))
    found = lesson.divergence(ours)
    if kept == 97:
        whole = kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none").sum(
            -1
        )
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    assert (found >= 0).all()
    found.sum().backward()
    assert ours.grad.isfinite().all()
    assert lesson.divergence(theirs).abs().max() < 1e-4


def test_a_model_learns_from_its_full_attention(trainer):
    steps = trainer(distill=1.0, steps=4).run()
    assert all(step.loss > 0 for step in steps)
