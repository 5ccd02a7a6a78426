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
