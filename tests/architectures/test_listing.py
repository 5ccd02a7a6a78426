"""Every decoder-only model type of the installed transformers is listed, without a list of ours."""

import pytest
from transformers.models.auto import modeling_auto

from memlong.architectures import Architecture, architectures, encoder_decoders, is_model_type, of_model_type
from memlong.architectures.listing import default_config
from memlong.errors import UnknownNameError

MAPPINGS = [
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
]


def test_every_model_type_that_transformers_maps_is_listed_or_has_an_encoder():
    listed = {each.model_type for each in architectures()}
    assert listed.isdisjoint(encoder_decoders())
    assert listed | set(encoder_decoders()) == set().union(*MAPPINGS)
    assert all(default_config(model_type).is_encoder_decoder for model_type in encoder_decoders())


def test_a_type_with_a_class_for_text_and_one_for_images_has_both():
    found = of_model_type("qwen3_5")
    assert [each.class_name for each in found] == ["Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"]


def test_the_list_is_sorted_and_holds_nothing_twice():
    found = architectures()
    assert list(found) == sorted(set(found))
    assert Architecture("llama", "LlamaForCausalLM") in found


def test_an_unknown_model_type_is_named():
    assert not is_model_type("lama")
    assert not is_model_type("bart")  # an encoder reads its text
    with pytest.raises(UnknownNameError, match=r"'lama'.*memlong models"):
        of_model_type("lama")
