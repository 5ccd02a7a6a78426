"""What a model is made of is found by running it."""

from __future__ import annotations

import pytest
import torch
import transformers

from memlong import MemoryDecoder
from memlong.decoder.probe import probe
from memlong.errors import UnsupportedModelError

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_model(kind: str, **changes):
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_every_architecture_shows_which_layers_rotate(tiny_model, architecture):
    layout = probe(tiny_model(architecture))
    rotated = [True, True, architecture != "SmolLM3", True]
    assert [layer.rope.call is not None for layer in layout.layers.values()] == rotated


def test_a_rotation_that_hardly_moves_the_keys_is_found_in_bfloat16_too():
    model = random_model("Llama", attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias[7] = 200.0  # the slowest pair of dimensions dwarfs all others
    layout = probe(model.to(torch.bfloat16))
    assert all(layer.rope.call is not None for layer in layout.layers.values())


def test_sliding_windows_are_found(tiny_model):
    layout = probe(tiny_model("Gemma3"))
    assert [layer.sliding_window for layer in layout.layers.values()] == [40, None, 40, None]
    assert layout.full_attention_layers == (1, 3)
    assert probe(tiny_model("Mistral-sliding")).full_attention_layers == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: random_model("GPT2"), "no rotary positions"),
        (lambda: random_model("Falcon"), "does not let its attention be replaced"),
        (lambda: torch.nn.Linear(2, 2), "Linear is no transformers model"),
        (
            lambda: transformers.BertModel(
                transformers.BertConfig(
                    vocab_size=97, hidden_size=32, num_attention_heads=4, num_hidden_layers=1
                )
            ),
            "not a decoder-only language model; load it with AutoModelForCausalLM",
        ),
    ],
)
def test_an_unsupported_model_is_refused_with_the_reason_and_left_alone(make, message):
    model = make()
    with pytest.raises(UnsupportedModelError, match=message):
        probe(model)
    if hasattr(model, "config"):
        assert not model.config._attn_implementation.startswith("memlong")


def test_an_attention_implementation_that_memory_cannot_wrap_is_named(llama):
    llama.set_attn_implementation("flex_attention")
    with pytest.raises(
        UnsupportedModelError, match=r"'flex_attention'; memory attaches to 'sdpa' and 'eager'"
    ):
        probe(llama)


def test_a_model_has_one_memory_at_a_time(llama, small):
    with (
        MemoryDecoder(llama, None, small()),
        pytest.raises(UnsupportedModelError, match="already has a memory attached"),
    ):
        MemoryDecoder(llama, None, small())
