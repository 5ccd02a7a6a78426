"""Models that are not, as a whole, where memory is: what works, and what is refused when attached."""

from __future__ import annotations

import accelerate
import pytest
import torch

from memlong import MemoryDecoder
from memlong.decoder.model.probe import probe
from memlong.errors import UnsupportedModelError
from memlong.testing import ARCHITECTURES

LAYERS = 4


def test_a_model_on_several_devices_is_refused_by_their_names(llama, small):
    llama.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": "cpu"}
    with pytest.raises(
        UnsupportedModelError, match=r"not all of it is on one device \(it is on cuda:0, cuda:1\)"
    ):
        MemoryDecoder(llama, None, small())


def test_a_model_whose_embeddings_are_offloaded_is_refused(llama, small):
    offloaded = accelerate.cpu_offload(llama, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match=r"it is offloaded.*device_map="):
        MemoryDecoder(offloaded, None, small())


def test_a_layer_on_disk_is_fetched_as_ever(tiny_model, small, text, tmp_path):
    ids = text(100)
    with MemoryDecoder(tiny_model(), None, small()) as decoder:
        expected = decoder.read(ids)
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer == 2 else "cpu" for layer in range(LAYERS)}
    model = accelerate.dispatch_model(
        tiny_model(), places, offload_dir=str(tmp_path), main_device="cpu", force_hooks=True
    )
    with MemoryDecoder(model, None, small()) as decoder:
        assert torch.equal(decoder.read(ids), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rotations_move_with_the_model(tiny_model, architecture):
    model = tiny_model(architecture)
    layout = probe(model)
    model.to("meta")  # a device that every machine has
    cos, sin = layout.layers[0].rope.angles(torch.arange(4, device="meta")[None])
    assert (cos.device.type, sin.device.type) == ("meta", "meta")


def _wrapped(model):
    return torch.compile(model, backend="eager")


def _in_place(model):
    model.compile(backend="eager")
    return model


def _its_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def _a_layer(model):
    model.model.layers[1].compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [_wrapped, _in_place, _its_forward, _a_layer])
def test_a_compiled_model_is_refused(llama, small, compiled):
    with pytest.raises(UnsupportedModelError, match=r"compiled.*Give the model as it was before"):
        MemoryDecoder(compiled(llama), None, small())
