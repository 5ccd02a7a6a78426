"""What a model is made of is found by running it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from memlong import MemoryDecoder, Registry
from memlong.architectures import tiny_model_of
from memlong.decoder.model import attention
from memlong.decoder.model.probe import probe
from memlong.decoder.model.trial import try_out
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
        (lambda: torch.nn.Linear(2, 2), "Linear is not a transformers model"),
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


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("bloom", "does not let its attention be replaced"),
        ("deepseek_v32", "chooses which keys to attend to by an index of its own"),
        ("doge", "DogeAttention makes a mask of its own"),
        ("inkling_text", r"adds a bias of its own to the logits of queries and keys \(position_bias\)"),
        (
            "jamba",
            "transformers' own implementation cannot go on from its cache with several tokens at a time",
        ),
        ("llama4_text", "goes by chunks of the text, at whose borders all before is hidden"),
        ("mamba2", "does not attend to keys and values"),
        (
            "minimax",
            "does not read a token of text, at a given position, into a cache.*MiniMax uses cache of its own",
        ),
        ("opt", r"no rotary positions \(RoPE\): both keys and values of layer 0 change with the position"),
        (
            "recurrent_gemma",
            r"RecurrentBlock keeps a state of its own \(conv1d_state\) outside the cache",
        ),
        ("qwen2_5_omni", "no one table of token embeddings; give the part of it that reads text"),
    ],
)
def test_what_cannot_have_a_memory_is_refused_with_its_own_reason(model_type, message):
    model = tiny_model_of(model_type)
    with pytest.raises(UnsupportedModelError, match=message):
        MemoryDecoder(model, None)
    assert not any(hasattr(module, "_memlong_slot") for module in model.modules())


def test_a_model_that_goes_through_a_layer_twice_is_refused():
    model = random_model("Llama")
    inner = model.model.layers[1].forward

    def twice(hidden, **given):
        return inner(inner(hidden, **given), **given)

    model.model.layers[1].forward = twice
    with pytest.raises(UnsupportedModelError, match="goes through layer 1 several times a token"):
        probe(model)


def test_a_window_that_only_the_mask_knows_is_found(monkeypatch):
    told = attention._attention

    def without_window(base, module, *tensors, sliding_window=None, **options):
        assert sliding_window == 40
        return told(base, module, *tensors, **options)

    monkeypatch.setattr(attention, "_attention", without_window)
    layout = probe(random_model("Mistral", sliding_window=40))
    assert {layer.sliding_window for layer in layout.layers.values()} == {40}


def test_a_trial_finds_what_the_pass_of_one_token_cannot():
    model = random_model("Llama")
    for layer in model.model.layers:

        def with_the_mean(*, hidden_states, inner=layer.self_attn.forward, **given):  # of the call's tokens
            output, weights = inner(hidden_states=hidden_states, **given)
            return output + hidden_states.mean(dim=1, keepdim=True), weights

        layer.self_attn.forward = with_the_mean
    layout = replace(probe(model), is_unusual=True)
    with pytest.raises(UnsupportedModelError, match="cannot go on from its cache with several tokens"):
        try_out(model, layout, Registry())


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
