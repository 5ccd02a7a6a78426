"""Gradients through a stream: where they come to, and where they end."""

from __future__ import annotations

import pytest
import torch

from memlong import MemoryDecoder
from memlong.errors import MemlongError
from memlong.training import fit_latent_maps


@pytest.fixture
def latent(llama, small, text, tmp_path):
    """A decoder whose memory is made by maps, with gates."""
    path = tmp_path / "maps.safetensors"
    fit_latent_maps(llama, [text(200)], dim=32, layers="2-3").save(path)
    settings = {"kv_source": "latent", "maps": str(path), "retrieval_layers": "2-3", "gate_init": 0.0}
    return MemoryDecoder(llama.requires_grad_(False), None, small(**settings))


def test_a_stream_records_no_gradients_unless_asked(latent, text):
    with latent as decoder:
        assert not any(segment.logits.requires_grad for segment in decoder.stream(text(60)))


def test_gradients_reach_what_makes_the_memory(latent, text):
    with latent as decoder:
        *_, last = decoder.stream(text(80), gradients=True)
        last.logits.logsumexp(dim=-1).sum().backward()
    assert decoder.gates.bias.grad.abs().sum() > 0
    assert decoder.source.maps.decode.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in decoder.model.parameters())


def test_segments_are_backpropagated_one_by_one(latent, text):
    with latent as decoder:
        for segment in decoder.stream(text(80), gradients=True):
            if segment.logits.requires_grad:  # from the first memory on
                segment.logits.sum().backward()
        for segment in decoder.stream(text(3, seed=1), gradients=True):
            segment.logits.sum().backward()
        for segment in decoder.stream(text(3, seed=2), gradients=True):  # the same memory, within the segment
            segment.logits.sum().backward()


def test_a_stream_gives_the_same_logits_with_gradients(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        plain = torch.cat([segment.logits for segment in decoder.stream(text(90))], dim=1)
        decoder.reset()
        found = torch.cat([each.logits.detach() for each in decoder.stream(text(90), gradients=True)], dim=1)
    torch.testing.assert_close(found, plain, rtol=0.0, atol=1e-5)


def test_the_window_is_a_constant(llama, small, text):
    ids = text(40)
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(ids[:, :16])
        (alone,) = decoder.stream(ids[:, 16:24], gradients=True)
        alone.logits.sum().backward()
        expected = llama.model.layers[0].self_attn.k_proj.weight.grad.clone()
        decoder.reset()
        llama.zero_grad()
        *_, last = decoder.stream(ids[:, :24], gradients=True)
        last.logits.sum().backward()
    torch.testing.assert_close(
        llama.model.layers[0].self_attn.k_proj.weight.grad, expected, rtol=1e-4, atol=1e-5
    )


def test_the_gradient_of_a_gate_is_what_small_steps_say(tiny_model, architecture, small, text):
    model = tiny_model(architecture).requires_grad_(False)
    with MemoryDecoder(model, None, small(gate_init=0.5)) as decoder:
        torch.manual_seed(0)
        weights = torch.randn(1, 8, 97)

        def loss(gradients):
            decoder.reset()
            *_, last = decoder.stream(text(64), gradients=gradients)
            return (last.logits.log_softmax(dim=-1) * weights).sum()

        loss(True).backward()
        layer = len(decoder.retrieval_layers) - 1
        slope = float(decoder.gates.bias.grad[layer, 1])
        step = 1e-2
        with torch.no_grad():
            decoder.gates.bias[layer, 1] += step
            above = float(loss(False))
            decoder.gates.bias[layer, 1] -= 2 * step
            below = float(loss(False))
    assert slope == pytest.approx((above - below) / (2 * step), rel=0.05, abs=0.05)


def gradients_of(decoder, ids, *, checkpointed, together):
    """Losses, and gradients of all that learns, of a text read in training mode."""
    model = decoder.model
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    else:
        model.gradient_checkpointing_disable()
    learning = {**dict(model.named_parameters()), **dict(decoder.gates.named_parameters())}
    for each in learning.values():
        each.grad = None
    decoder.reset()
    losses = []
    for segment in decoder.stream(ids, gradients=True):
        losses.append(segment.logits.log_softmax(dim=-1)[..., 5].sum())
        if not together and losses[-1].requires_grad:
            losses[-1].backward()
    if together:
        torch.stack(losses).sum().backward()
    found = {name: each.grad.clone() for name, each in learning.items() if each.grad is not None}
    return torch.stack(losses).detach(), found


@pytest.mark.filterwarnings("ignore::FutureWarning")  # newer transformers have another name for it
@pytest.mark.parametrize("together", [False, True], ids=["by segment", "all at the end"])
def test_gradient_checkpointing_changes_no_gradient(tiny_model, architecture, small, text, together):
    model = tiny_model(architecture)
    with MemoryDecoder(model, None, small(gate_init=0.5)) as decoder:
        losses, expected = gradients_of(decoder, text(80), checkpointed=False, together=together)
        again, found = gradients_of(decoder, text(80), checkpointed=True, together=together)
        assert model.is_gradient_checkpointing
    assert torch.equal(again, losses)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=0.0, atol=1e-5 * max(1.0, float(gradient.abs().max()))
        )


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_of_either_kind_keeps_less_and_runs_layers_twice(llama, small, text):
    calls = []
    llama.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with MemoryDecoder(llama, None, small()) as decoder:
        for settings in ({"use_reentrant": True}, {"use_reentrant": False, "preserve_rng_state": False}):
            llama.train()
            llama.gradient_checkpointing_enable(settings)
            decoder.reset()
            *_, last = decoder.stream(text(60), gradients=True)
            forward = len(calls)
            last.logits.sum().backward()
            assert len(calls) == forward + 1
            calls.clear()
        plain = decoder.read(text(8))
        assert not plain.requires_grad
        assert torch.isfinite(plain).all()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_runs_again_without_its_memory_is_refused(llama, small, text):
    llama.gradient_checkpointing_enable()
    with MemoryDecoder(llama, None, small()) as decoder:
        llama.train()
        *_, last = decoder.stream(text(60), gradients=True)
    with pytest.raises(MemlongError, match="call backward\\(\\) inside `with decoder:`"):
        last.logits.sum().backward()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_in_training_mode_that_checkpoints_reads_as_any(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        expected = decoder.read(text(60))
        llama.gradient_checkpointing_enable()
        llama.train()
        decoder.reset()
        assert torch.equal(decoder.read(text(60)), expected)
