"""Every kind of RoPE, at every length: memory of everything is full attention, and nothing drifts."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from memlong import MemoryDecoder
from memlong.decoder.model.probe import probe
from memlong.errors import InvalidArgumentError

TOLERANCE = {"rtol": 0.0, "atol": 2e-5}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "factor": 2.0,
        "original_max_position_embeddings": 256,
    },
}


@pytest.fixture(params=list(ROPES))
def rope(request):
    return request.param


@pytest.fixture
def model_with(text):
    def build(rope, layers):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rope_parameters={"rope_theta": 10_000.0, **ROPES[rope]},
        )
        return LlamaForCausalLM(config).eval()

    return build


@pytest.fixture
def windowed():
    def build(kind):
        torch.manual_seed(0)
        sizes = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "sliding_window": 48,
            "pad_token_id": 0,
        }
        types = {"layer_types": ["sliding_attention", "full_attention"]}
        if kind == "Mistral":
            return MistralForCausalLM(MistralConfig(**sizes)).eval()
        if kind == "Gemma3":
            return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **types)).eval()
        experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
        config = GptOssConfig(
            **sizes, **types, **experts, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
        )
        config._attn_implementation = "eager"
        return GptOssForCausalLM(config).eval()

    return build


def test_memory_of_the_whole_prefix_equals_full_attention(model_with, rope, small, text):
    model, ids = model_with(rope, 3), text(150)
    with MemoryDecoder(model, None, small(position_mode="original", top_k=64)) as decoder:
        found = torch.cat([segment.logits[0] for segment in decoder.stream(ids)])
        assert len(decoder.banks[0]) > 25
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits[0], **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("position_mode", ["zero", "before-window"])
def test_the_same_text_is_met_alike_however_far_it_stands(model_with, rope, small, text, position_mode):
    # In one layer K-V depend on tokens alone, so a text that comes again and again, and whose latest chunks are
    # what is retrieved, must get the same logits every time, to the last digit that float32 has.
    config = small(retriever="recent", position_mode=position_mode)
    assert_met_alike(model_with(rope, 1), config, text, early=256)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Mistral", "Gemma3", "GPT-OSS"])
@pytest.mark.parametrize("position_mode", ["zero", "before-window"])
def test_layers_with_sliding_windows_do_not_drift(windowed, kind, small, text, position_mode):
    # Of two layers, one slides; what the second stored depends on all before, ever less, so it is compared late.
    config = small(retriever="recent", position_mode=position_mode, retrieval_layers="0-1")
    assert_met_alike(windowed(kind), config, text, early=1216)


def assert_met_alike(model, config, text, *, early):
    verse = text(32)
    ids = torch.cat([text(2, seed=1), verse.repeat(1, 75)], dim=1)
    last: dict[int, torch.Tensor] = {}
    with MemoryDecoder(model, None, config) as decoder:
        for segment in decoder.stream(ids):
            last[int(segment.tokens[0, 0])] = segment.logits[0]
    for step in (0, 8):
        torch.testing.assert_close(last[2368 + step], last[early + step], **TOLERANCE)


def test_positions_end_where_the_rotation_changes(model_with, small):
    model = model_with("longrope", 1)
    assert probe(model).max_positions == 256
    with pytest.raises(InvalidArgumentError, match="the 256 positions that"):
        MemoryDecoder(model, None, small(local_window=300))


def test_gpt_oss_attends_to_memory_beside_its_learned_sinks(small, text):
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=0,
    )
    config._attn_implementation = "eager"
    model, ids = GptOssForCausalLM(config).eval(), text(150)
    assert [layer.sliding_window for layer in probe(model).layers.values()] == [32, None, 32, None]
    config = small(position_mode="original", top_k=64, retrieval_layers="0-3")
    with MemoryDecoder(model, None, config) as decoder:
        found = torch.cat([segment.logits[0] for segment in decoder.stream(ids)])
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits[0], **TOLERANCE)
