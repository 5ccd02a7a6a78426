"""Latent maps are fitted where the model is, whatever device the text is on."""

from __future__ import annotations

import accelerate
import pytest
import torch

from memlong.errors import InvalidArgumentError
from memlong.training import fit_latent_maps, latent

LAYERS = 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_passages_are_moved_to_the_model(tiny_model, text, device):
    expected = fit_latent_maps(tiny_model(), [text(60)], dim=8)
    found = fit_latent_maps(tiny_model().to("cuda"), [text(60).to(device)], dim=8)
    torch.testing.assert_close(found.mean, expected.mean, rtol=0.0, atol=1e-3)


def test_passages_go_where_the_token_embeddings_are(llama, text, monkeypatch):
    asked = []
    monkeypatch.setattr(latent, "to_device", lambda tensor, device: asked.append(device) or tensor)
    fit_latent_maps(llama, [text(40), text(30, seed=1)], dim=8)
    assert asked == [llama.get_input_embeddings().weight.device] * 2


def test_a_layer_on_disk_is_fitted_like_any(tiny_model, text, tmp_path):
    expected = fit_latent_maps(tiny_model(), [text(60)], dim=8).state_dict()
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer == 2 else "cpu" for layer in range(LAYERS)}
    model = accelerate.dispatch_model(
        tiny_model(), places, offload_dir=str(tmp_path), main_device="cpu", force_hooks=True
    )
    found = fit_latent_maps(model, [text(60)], dim=8).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("passage", "words"),
    [
        (torch.zeros(2, 60, dtype=torch.int64), r"passages must be a list .* got shape \(2, 60\)"),
        (torch.zeros(1, 60), "must be an integer tensor"),
        (torch.full((1, 60), 10**6), "must be from 0 to"),
    ],
)
def test_what_is_no_passage_is_refused(llama, passage, words):
    with pytest.raises(InvalidArgumentError, match=words):
        fit_latent_maps(llama, [passage], dim=8)


def test_one_layers_kv_is_the_vector_and_all_are_read_from_it(llama, text):
    maps = fit_latent_maps(llama, [text(200)], memory_layer=1)
    keys, values = torch.randn(2, LAYERS, *maps.mean.shape[2:3], 7, maps.mean.shape[3])
    latent = maps.to_latent(keys, values)
    back_keys, back_values = maps.from_latent(latent, maps.layers)
    torch.testing.assert_close(back_keys[1], keys[1])
    torch.testing.assert_close(back_values[1], values[1])
    mean = maps.mean[:, 1, :, None]
    torch.testing.assert_close(
        latent, (torch.stack([keys[1], values[1]]) - mean).permute(2, 0, 1, 3).flatten(1)
    )
    assert maps.dim == maps.mean[:, 1].numel()


def test_maps_from_one_layer_are_those_of_a_regression(llama, text, monkeypatch):
    seen = {}
    states = latent._Watch.states
    monkeypatch.setattr(
        latent._Watch, "states", lambda self: seen.setdefault("kv", states(self).clone()).clone()
    )
    maps = fit_latent_maps(llama, [text(400)], memory_layer=1)
    kv = (seen["kv"] - maps.mean).double()
    inputs, wanted = kv[:, :, 1].flatten(1), kv[:, :, 3].flatten(1)
    penalty = 1e-3 * float(inputs.square().sum(dim=0).mean())
    rows = torch.cat([inputs, penalty**0.5 * torch.eye(inputs.shape[1], dtype=inputs.dtype)])
    targets = torch.cat([wanted, wanted.new_zeros(inputs.shape[1], wanted.shape[1])])
    expected = torch.linalg.lstsq(rows, targets).solution
    found = maps.decode.detach()[:, 3].flatten(0, 2).T.double()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4)


def test_a_memory_layer_must_be_one_of_the_layers_and_gives_the_size(llama, text):
    with pytest.raises(
        InvalidArgumentError, match="memory_layer must be one of the retrieval layers 2-3, got 1"
    ):
        fit_latent_maps(llama, [text(200)], memory_layer=1, layers="2-3")
    with pytest.raises(InvalidArgumentError, match="dim must be left out with memory_layer"):
        fit_latent_maps(llama, [text(200)], memory_layer=1, dim=2)
