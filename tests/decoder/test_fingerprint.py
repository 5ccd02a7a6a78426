"""The fingerprint knows what keys and values depend on, and nothing else."""

from __future__ import annotations

import json

import accelerate
import pytest
import torch
import transformers

from memlong import MemoryDecoder
from memlong.decoder.persistence.fingerprint import differences
from memlong.errors import SnapshotError, UnsupportedModelError

TEXT = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}


@pytest.fixture
def told(small):
    """Fingerprint of a model, as a file gives it back."""

    def make(model):
        return json.loads(json.dumps(MemoryDecoder(model, None, small()).fingerprint()))

    return make


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pad_token_id", 7),
        ("eos_token_id", [2, 5]),
        ("use_cache", False),
        ("output_hidden_states", True),
        ("attention_dropout", 0.5),
        ("initializer_range", 0.5),
        ("router_aux_loss_coef", 0.1),
        ("transformers_version", "6.0.0"),
        ("architectures", ["Other"]),
        ("id2label", {0: "yes"}),
        ("max_length", 9),
        ("max_position_embeddings", 4096),
        ("a_field_of_a_newer_release", "default"),
    ],
)
def test_what_cannot_change_keys_and_values_is_no_other_model(tiny_model, told, field, value):
    before, model = told(tiny_model()), tiny_model()
    setattr(model.config, field, value)
    assert differences(told(model), before) == []
    assert differences(before, told(model)) == []


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rms_norm_eps", 1e-3, "rms_norm_eps (1e-06 when it was saved, 0.001 now)"),
        ("hidden_act", "relu", "hidden_act ('silu' when it was saved, 'relu' now)"),
    ],
)
def test_a_refusal_names_the_field_and_both_values(tiny_model, told, field, value, said):
    before, model = told(tiny_model()), tiny_model()
    setattr(model.config, field, value)
    assert differences(told(model), before) == [said]


def test_a_rotation_that_grows_with_the_text_counts_the_number_of_positions(tiny_model, told):
    before, model = told(tiny_model("Llama-YaRN")), tiny_model("Llama-YaRN")
    model.config.max_position_embeddings = 1024
    model.config.rope_parameters["factor"] = 8.0
    assert differences(told(model), before) == [
        "max_position_embeddings (512 when it was saved, 1024 now)",
        "rope_parameters.factor (4.0 when it was saved, 8.0 now)",
    ]


def test_the_head_over_the_vocabulary_makes_no_keys(tiny_model, told):
    before, model = told(tiny_model()), tiny_model()
    with torch.no_grad():
        model.lm_head.weight += 1
    assert told(model) == before


def test_a_fingerprint_of_an_earlier_form_is_refused_as_such(llama, small, text, tmp_path):
    decoder = MemoryDecoder(llama, None, small())
    ours = decoder.fingerprint()
    earlier = {**ours, "config": 64 * "0", "rope": 64 * "0"}
    assert differences(ours, earlier) == [
        "the form of the fingerprint, which is of an earlier memlong and cannot be compared"
    ]


def on_disk(model, folder):
    places = {f"model.layers.{index}": ("cpu", "disk")[index % 2] for index in range(4)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return accelerate.dispatch_model(
        model, places, offload_dir=str(folder), main_device="cpu", force_hooks=True
    )


def test_offloaded_weights_are_the_same_weights(tiny_model, told, tmp_path):
    before = told(tiny_model())
    assert told(on_disk(tiny_model(), tmp_path / "same")) == before
    other = told(on_disk(tiny_model(seed=1), tmp_path / "other"))
    assert differences(other, before) == ["weights"]


def test_streams_of_an_offloaded_model_go_on_in_another(tiny_model, small, text, tmp_path):
    with MemoryDecoder(on_disk(tiny_model(), tmp_path / "weights"), None, small()) as decoder:
        decoder.read(text(90))
    decoder.save(tmp_path / "streams")
    assert MemoryDecoder.load(tmp_path / "streams", tiny_model(), None, small()).tokens_read == (90,)
    with pytest.raises(SnapshotError, match="what differs: weights"):
        MemoryDecoder.load(tmp_path / "streams", tiny_model(seed=1), None, small())


def test_a_decoder_of_an_offloaded_model_is_written_and_read(tiny_model, small, tmp_path):
    model = on_disk(tiny_model(), tmp_path / "weights")
    MemoryDecoder(model, None, small(gate_init=0.0)).save_pretrained(tmp_path / "decoder")
    written = json.loads((tmp_path / "decoder" / "memlong.json").read_text())
    MemoryDecoder(tiny_model(), None, small(gate_init=0.0)).save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "memlong.json").read_text()) == written
    assert MemoryDecoder.from_pretrained(tmp_path / "decoder", model)


def test_weights_that_are_nowhere_are_refused_by_name(llama, small):
    decoder = MemoryDecoder(llama, None, small())
    llama.model.layers[1].mlp.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"weights model\.layers\.1\.mlp\..* meta device"):
        decoder.fingerprint()


def multimodal():
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=vision, mm_tokens_per_image=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    model.config.pad_token_id = 0
    return model


def test_a_vision_tower_makes_no_keys_of_text(told):
    before, model = told(multimodal()), multimodal()
    with torch.no_grad():
        for parameter in model.model.vision_tower.parameters():
            parameter += 1
    model.config.vision_config.layer_norm_eps = 0.1
    assert told(model) == before
    assert before["model"] == "Gemma3TextModel"
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight += 1
    assert differences(told(model), before) == ["weights"]


def test_the_text_model_of_a_multimodal_one_is_the_same_model(told):
    model = multimodal()
    text = transformers.Gemma3ForCausalLM(model.config.text_config).eval()
    text.model.load_state_dict(model.model.language_model.state_dict())
    assert differences(told(text), told(model)) == []
