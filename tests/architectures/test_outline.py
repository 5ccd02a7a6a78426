"""What memory would take with a model is found out without its weights, and is what it takes with them."""

import json
import sys

import pytest
import torch
import transformers
from transformers import Gemma3Config, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from memlong import MemoryConfig, MemoryDecoder
from memlong.architectures import outline, read_config, tiny_model_of
from memlong.errors import InvalidArgumentError

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "own-llama"

class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "phi",
        "gpt_neox",
        "qwen2",
        "gemma3_text",
        "gemma4_text",
        "qwen3_next",
        "deepseek_v3",
        "falcon_h1",
        "lfm2",
    ],
)
def test_an_outline_is_what_the_model_itself_says(model_type):
    model = tiny_model_of(model_type)
    decoder = MemoryDecoder(model, None, MemoryConfig(position_mode="original"))
    found = outline(model.config)
    assert found.attaches
    assert found.retrieval_layers == decoder.retrieval_layers
    assert found.windows == {i: layer.sliding_window for i, layer in decoder.model_layout.layers.items()}
    assert found.max_positions == decoder.model_layout.max_positions
    assert found.token_bytes["float32"] == decoder.layout.nbytes // decoder.config.chunk_size
    assert found.token_bytes["bfloat16"] * 2 == found.token_bytes["float32"]


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])  # whose heads are a setting, and which are not
def test_a_model_of_seventy_billion_weights_is_outlined_in_seconds(kind):
    config = kind(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        bos_token_id=128_000,
        eos_token_id=[128_001, 128_009],
    )
    found = outline(config)
    assert found.retrieval_layers == tuple(range(80))
    assert found.token_bytes["bfloat16"] == 2 * 80 * 8 * 128 * 2
    assert config.hidden_size == 8192  # it is the caller's


def test_layers_with_a_window_do_not_retrieve_where_others_can():
    text = {
        "num_hidden_layers": 6,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    found = outline(Gemma3Config(text_config={**text, "sliding_window": 512}))
    assert (found.class_name, found.retrieval_layers) == ("Gemma3ForConditionalGeneration", (5,))
    assert found.windows == {**dict.fromkeys(range(5), 512), 5: None}


def test_a_window_in_every_layer_is_the_limit_of_the_local_window():
    found = outline(MistralConfig(num_hidden_layers=2, sliding_window=1000))
    assert found.local_window == (384, 999)
    assert outline(MistralConfig(num_hidden_layers=2, sliding_window=None)).local_window == (384, 131_067)


def test_a_model_without_rotary_positions_says_why():
    found = outline(GPT2Config(n_layer=2))
    assert not found.attaches
    assert "rotary positions" in found.reason


def test_a_configuration_is_read_without_weights(tmp_path):
    LlamaConfig(num_hidden_layers=3).save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        assert read_config(str(name)).num_hidden_layers == 3


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"none\.json.*\n.*memlong models"):
        read_config(str(tmp_path / "none.json"))


def test_a_model_type_without_a_decoder_is_named():
    found = outline(transformers.ViTConfig())
    assert not found.attaches
    assert "generates text" in found.reason


def test_code_of_a_models_own_is_run_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "model"
    LlamaConfig(num_hidden_layers=2).save_pretrained(folder)
    (folder / "own.py").write_text(OWN_CODE)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "own-llama",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InvalidArgumentError, match="--trust-remote-code"):
        read_config(str(folder))
    found = outline(read_config(str(folder), trust_remote_code=True))
    assert (found.class_name, found.retrieval_layers) == ("Model", (0, 1))


def test_the_random_generator_is_left_alone():
    before = torch.get_rng_state()
    outline(LlamaConfig(num_hidden_layers=1))
    assert torch.equal(torch.get_rng_state(), before)
