"""K-V sources: what is stored for a chunk, and what retrieval layers make of it."""

from __future__ import annotations

import pytest
import torch

from memlong import MemoryDecoder
from memlong.decoder.kv.latent import LatentMaps
from memlong.errors import InvalidArgumentError
from memlong.training import fit_latent_maps

TOLERANCE = {"rtol": 0.0, "atol": 1e-3}


def read(model, config, ids):
    with MemoryDecoder(model, None, config) as decoder:
        return decoder.read(ids), decoder.banks[0]


@pytest.fixture
def maps_file(tmp_path, text):
    def make(model, **options):
        options.setdefault("dim", 16)
        path = tmp_path / "maps.safetensors"
        fit_latent_maps(model, list(text(600).split(60, dim=1)), **options).save(path, compact=False)
        return str(path)

    return make


def all_numbers(model):
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width


def test_a_vector_of_all_numbers_is_each_layers_own_kv(tiny_model, architecture, small, text, maps_file):
    model = tiny_model(architecture)
    expected, bank = read(model, small(), text(150))
    layers = bank.layout.shape[0]
    dim = all_numbers(model) * layers // model.config.num_hidden_layers
    maps = maps_file(model, dim=dim)
    found, bank = read(model, small(kv_source="latent", maps=maps), text(150))
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert bank.layout.shape == (1, 1, 4, dim // 2)


def test_the_more_numbers_the_nearer(llama, small, text, maps_file):
    ids = text(150)
    own, _ = read(llama, small(), ids)
    errors = []
    for dim in (8, 64, 160):
        found, _ = read(llama, small(kv_source="latent", maps=maps_file(llama, dim=dim)), ids)
        errors.append(float((found - own).norm()))
    assert errors == sorted(errors, reverse=True)


def test_maps_of_some_layers_serve_those(llama, small, text, maps_file):
    maps = maps_file(llama, layers="2-3", dim=96)
    found, bank = read(llama, small(kv_source="latent", maps=maps, retrieval_layers="2-3"), text(150))
    expected, _ = read(llama, small(retrieval_layers="2-3"), text(150))
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert bank.layout.shape == (1, 1, 4, 48)


def test_rows_of_a_batch_share_maps_and_nothing_else(llama, small, text, maps_file):
    config = small(kv_source="latent", maps=maps_file(llama, dim=48))
    ids = text(120, rows=2)
    with MemoryDecoder(llama, None, config) as decoder:
        together = decoder.read(ids)
    for row in range(2):
        alone, _ = read(llama, config, ids[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0.0, atol=1e-5)


def test_shared_by_the_memory_layer_alone_is_its_own(llama, small, text):
    expected, _ = read(llama, small(retrieval_layers="2"), text(150))
    found, _ = read(llama, small(kv_source="shared", memory_layer=2, retrieval_layers="2"), text(150))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


def test_shared_stores_one_layer_for_all(tiny_model, architecture, small, text):
    model = tiny_model(architecture)
    own, bank = read(model, small(), text(150))
    per_layer = bank.nbytes - bank.embeddings.embeddings.nbytes
    layers = bank.layout.shape[0]
    found, bank = read(model, small(kv_source="shared"), text(150))
    assert bank.layout.shape[0] == 1
    assert bank.nbytes - bank.embeddings.embeddings.nbytes == per_layer // layers
    assert not torch.equal(found, own)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_source": "latent"}, "maps must name the file that `memlong fit` wrote .*, got None"),
        ({"kv_source": "latent", "maps": "/nowhere"}, "maps names '/nowhere', which cannot be read"),
        (
            {"kv_source": "shared", "memory_layer": 9},
            "memory_layer must be among 0-3, the layers with K-V of their own, got 9",
        ),
    ],
)
def test_what_cannot_be_is_said(llama, small, changes, words):
    with pytest.raises(InvalidArgumentError, match=words):
        MemoryDecoder(llama, None, small(**changes))


def test_maps_of_other_layers_are_refused(llama, small, maps_file):
    maps = maps_file(llama, layers="3")
    with pytest.raises(
        InvalidArgumentError, match=r"made for the layers \(3,\) .* but memory is in the layers"
    ):
        MemoryDecoder(llama, None, small(kv_source="latent", maps=maps))


def test_a_file_of_something_else_is_refused(llama, small, tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InvalidArgumentError, match="of format None"):
        MemoryDecoder(llama, None, small(kv_source="latent", maps=str(tmp_path / "x.safetensors")))


def test_maps_come_back_as_they_were_saved(llama, text, tmp_path):
    maps = fit_latent_maps(llama, [text(60)], dim=8)
    maps.save(tmp_path / "maps.safetensors", compact=False)
    again = LatentMaps.load(tmp_path / "maps.safetensors")
    assert again.layers == maps.layers
    for mine, other in zip(maps.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(mine, other)


def test_maps_in_int8_are_exact_in_bfloat16_too(llama, text, tmp_path):
    maps = fit_latent_maps(llama, [text(60)], dim=8)
    exact = {name: tensor.clone() for name, tensor in maps.state_dict().items()}
    maps.save(tmp_path / "maps.safetensors")
    maps.round_to_saved()
    for dtype in (torch.float32, torch.bfloat16):
        again = LatentMaps.load(tmp_path / "maps.safetensors").to(dtype)
        again.save(tmp_path / "again.safetensors")
        again = LatentMaps.load(tmp_path / "again.safetensors")
        assert again.layers == maps.layers
        for name in ("encode", "decode"):
            mine = maps.state_dict()[name]
            assert torch.equal(again.state_dict()[name], mine)
            largest = exact[name].abs().amax(dim=-1, keepdim=True)
            assert (
                (mine - exact[name]).abs() <= largest / 127 + 1e-12
            ).all()  # half a step, which is rounded up


@pytest.mark.parametrize("dim", [0, 7, 60])
def test_a_width_that_cannot_be_is_refused(llama, text, dim):
    with pytest.raises(InvalidArgumentError, match=f"less than the 60 tokens of text, got {dim}:"):
        fit_latent_maps(llama, [text(60)], dim=dim)


def test_more_numbers_than_there_are_is_refused(llama, text):
    most = all_numbers(llama)
    with pytest.raises(
        InvalidArgumentError,
        match=f"dim must be at most {most}, the size of a token's keys and values in 4 layers",
    ):
        fit_latent_maps(llama, [text(most + 10)], dim=most + 2)


@pytest.mark.parametrize(
    "odd",
    [torch.zeros(3), torch.zeros(2, 4, 2, 12, 8, dtype=torch.int64), torch.full((2, 4, 2, 12, 8), torch.nan)],
)
def test_maps_that_cannot_be_are_named_with_their_file(llama, text, tmp_path, odd):
    from memlong.decoder.persistence.tensor_file import read_tensors, write_tensors

    path = tmp_path / "maps.safetensors"
    fit_latent_maps(llama, [text(60)], dim=8).save(path, compact=False)
    layers, tensors = read_tensors(path, "memlong-latent-maps-2", field="maps", command="memlong fit")
    write_tensors(path, "memlong-latent-maps-2", layers, {**tensors, "decode": odd})
    with pytest.raises(InvalidArgumentError, match=r"maps\.safetensors"):
        LatentMaps.load(path)
