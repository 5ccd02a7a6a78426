"""Tiny models have every kind of layer of the model that they stand for."""

import pytest
import torch

from memlong.architectures import architectures, tiny_config, tiny_model_of
from memlong.architectures.listing import default_config

MODEL_TYPES = sorted({each.model_type for each in architectures()})
BY_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers")


def sections(config):
    yield config
    text = config.get_text_config(decoder=True)
    if text is not config:
        yield text


@pytest.mark.parametrize("name", BY_LAYER)
def test_every_kind_of_layer_is_left(name):
    compared = 0
    for model_type in MODEL_TYPES:
        for default, tiny in zip(
            sections(default_config(model_type)), sections(tiny_config(model_type)), strict=True
        ):
            kinds = getattr(default, name, None)
            if isinstance(kinds, list) and kinds:
                assert set(getattr(tiny, name)) >= set(kinds) - {"full_attention"}, model_type
                compared += 1
    assert compared


def test_tiny_models_are_tiny():
    for model_type in MODEL_TYPES:
        text = tiny_config(model_type).get_text_config(decoder=True)
        assert getattr(text, "num_hidden_layers", 4) <= 16, model_type
        assert getattr(text, "vocab_size", 97) <= 97, model_type


def test_sliding_windows_are_shorter_than_the_texts_of_the_trials():
    assert tiny_config("gemma3_text").sliding_window == 40
    assert tiny_config("gemma3_text").layer_types == ["sliding_attention", "full_attention"] * 2


def test_layers_keep_what_they_have_of_their_own_in_proportion():
    for config in (default_config("gemma4_text"), tiny_config("gemma4_text")):
        settings = config.to_dict()
        own = [changes["head_dim"] for changes in settings["per_layer_config"].values()]
        assert set(own) == {2 * settings["head_dim"]}


def test_a_seed_makes_the_same_model_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        first, second, other = (tiny_model_of("qwen3_next", seed=seed)(ids).logits for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_class_for_text_alone_is_made_of_the_text_configuration():
    model = tiny_model_of("qwen3_5")
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    assert model.config.model_type == "qwen3_5_text"
