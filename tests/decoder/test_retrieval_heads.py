"""Retrieval heads: some K-V heads attend to memory and are stored, the others attend to the window alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import AttentionInterface, GptOssConfig, GptOssForCausalLM

from memlong import MemoryConfig, MemoryDecoder
from memlong.decoder.model.head_names import parse_heads, runs
from memlong.decoder.model.layer_names import heads_as_text
from memlong.errors import InvalidArgumentError, MemlongError, UnsupportedModelError
from memlong.training import score_heads

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
SOME = {0: (1,), 1: (0,), 3: (0, 1)}
ARCHITECTURES = ["Llama", "Qwen3", "GPT-NeoX"]


def logits_of(decoder, ids, **options):
    with decoder:
        return torch.cat([segment.logits[0] for segment in decoder.stream(ids, **options)])


def window_starts(config, tokens):
    """The first token after the sinks that each token's window holds."""
    departed, starts = 0, []
    for seen in range(0, tokens, config.segment_size):
        held = seen - config.sink_tokens - departed * config.chunk_size
        departed += max(0, -(-(held - config.window_past) // config.chunk_size))
        starts += [config.sink_tokens + departed * config.chunk_size] * config.segment_size
    return torch.tensor(starts[:tokens])


def by_masks(model, ids, config, heads):
    """Logits where each K-V head of ``heads`` sees all tokens before, and the others sinks and window."""
    index = torch.arange(ids.shape[1])
    causal = index[:, None] >= index
    local = causal & ((index >= window_starts(config, ids.shape[1])[:, None]) | (index < config.sink_tokens))

    def attend(module, query, key, value, _mask, scaling=None, **_):
        count, group = key.shape[1], query.shape[1] // key.shape[1]
        seen = torch.stack(
            [causal if head in heads.get(module.layer_idx, ()) else local for head in range(count)]
        )
        output = functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(group, 1),
            value.repeat_interleave(group, 1),
            attn_mask=seen.repeat_interleave(group, 0)[None],
            scale=scaling,
        )
        return output.transpose(1, 2), None

    before = model.config._attn_implementation
    AttentionInterface.register("by_masks", attend)
    model.set_attn_implementation("by_masks")
    try:
        with torch.no_grad():
            return model(ids).logits[0]
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_memory_of_everything_equals_masks_over_full_attention(
    tiny_model, architecture, attention, small, text
):
    model, ids = tiny_model(architecture, attention), text(150)
    config = small(position_mode="original", top_k=64, retrieval_heads=heads_as_text(SOME))
    decoder = MemoryDecoder(model, None, config)
    found = logits_of(decoder, ids)
    torch.testing.assert_close(found, by_masks(model, ids, config, SOME), **TOLERANCE)
    assert not torch.allclose(found, by_masks(model, ids, config, {}), atol=1e-3)
    with torch.no_grad():
        assert not torch.allclose(found, model(ids).logits[0], atol=1e-3)


@pytest.mark.parametrize("gate", [None, -1.0])
def test_all_heads_by_name_equal_all(llama, small, text, gate):
    ids, named = text(120), ",".join(f"{layer}:1+0" for layer in range(4))
    plain = logits_of(MemoryDecoder(llama, None, small(retrieval_layers="0-3", gate_init=gate)), ids)
    same = logits_of(MemoryDecoder(llama, None, small(retrieval_heads=named, gate_init=gate)), ids)
    assert torch.equal(plain, same)


def test_only_these_heads_are_stored(llama, small, text):
    some, every = (
        MemoryDecoder(llama, None, small(retrieval_layers="0-3", **settings))
        for settings in ({"retrieval_heads": "0:1,1:0,3:0+1"}, {})
    )
    for decoder in (some, every):
        logits_of(decoder, text(30))  # no chunk is retrieved yet, so that all heads are equal
    (stored,), (whole,) = ([decoder.banks[0].fetch(decoder.banks[0].ids)] for decoder in (some, every))
    assert stored.keys.shape[1:] == (1, 4, 4, 12)
    for mine, theirs in ((stored.keys[0, 0], whole.keys[0]), (stored.values[0, 0], whole.values[0])):
        # Sorted by heads, then by layer.
        expected = torch.stack([theirs[1, 0], theirs[3, 0], theirs[3, 1], theirs[0, 1]])
        torch.testing.assert_close(mine, expected, **TOLERANCE)


def test_logits_are_the_same_with_gradients_and_gates_learn(llama, small, text):
    ids = text(90)
    decoder = MemoryDecoder(
        llama.requires_grad_(False), None, small(retrieval_heads="1:0,2:1", gate_init=-0.5)
    )
    plain = logits_of(decoder, ids)
    decoder.reset()
    with decoder:
        found = [segment.logits[0] for segment in decoder.stream(ids, gradients=True)]
        found[-1].logsumexp(dim=-1).sum().backward()
    torch.testing.assert_close(torch.cat(found).detach(), plain, **TOLERANCE)
    learned = decoder.gates.bias.grad != 0  # [layers, heads]: only of heads that see memory
    assert learned.tolist() == [[True, True, False, False], [False, False, True, True]]


def test_token_by_token_equals_segments(llama, small, text):
    ids = text(96)
    decoder = MemoryDecoder(llama, None, small(retrieval_heads="1:0,2:1,3:0+1"))
    whole = logits_of(decoder, ids)
    decoder.reset()
    decoder_logits = []
    with decoder:
        for token in ids.split(1, dim=1):
            decoder_logits += [segment.logits[0] for segment in decoder.stream(token)]
    torch.testing.assert_close(torch.cat(decoder_logits), whole, **TOLERANCE)


@pytest.mark.parametrize("settings", [{}, {"store": {"host": "1MB", "dtype": "int8"}}])
def test_a_session_continues_where_it_was_saved(llama, small, text, tmp_path, settings):
    ids, config = text(120), small(retrieval_heads="0:1,1:0,3:0+1", **settings)
    first = MemoryDecoder(llama, None, config)
    logits_of(first, ids[:, :90])
    first.save(tmp_path / "session")
    second = MemoryDecoder.load(tmp_path / "session", llama, None, config)
    assert torch.equal(logits_of(first, ids[:, 90:]), logits_of(second, ids[:, 90:]))
    other = MemoryDecoder(llama, None, small(retrieval_heads="0:1,1:0", **settings))
    with pytest.raises(MemlongError, match="retrieval_heads"):
        other.restore(tmp_path / "session")


def test_ragged_rows_are_alone(llama, small, text):
    ids, lengths = text(100, rows=3), [100, 61, 13]
    mask = torch.stack([(torch.arange(100) >= 100 - length).long() for length in lengths])
    decoder = MemoryDecoder(llama, None, small(retrieval_heads="0:0,2:1"))
    with decoder:
        together = list(decoder.stream(ids, mask))
        for row, length in enumerate(lengths):
            decoder.reset()
            alone = torch.cat([each.logits[0] for each in decoder.stream(ids[row : row + 1, 100 - length :])])
            mine = torch.cat([each.logits[row][each.tokens[row] >= 0] for each in together])
            torch.testing.assert_close(mine, alone, **TOLERANCE)


def test_heads_as_users_write_them(llama, small):
    layout = MemoryDecoder(llama, None, small())._setup.model_layout
    assert parse_heads(" 3:1+0 , 1:1,1:0", layout, (1, 2, 3)) == {1: (0, 1), 3: (0, 1)}
    assert heads_as_text({3: (0, 1), 1: (1,), 2: ()}) == "1:1,3:0+1"
    assert runs((0, 1, 3)) == [slice(0, 2), slice(3, 4)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retrieval_heads": "1"}, "must be 'all', or K-V heads by layer such as '15:0\\+2,16:1'"),
        ({"retrieval_heads": "1:0,"}, "where '' is not one"),
        ({"retrieval_heads": "9:0"}, "must be of the retrieval layers 0-3, got layer 9"),
        ({"retrieval_heads": "1:2"}, "must be below 2, the K-V heads of layer 1, got 2"),
        (
            {"retrieval_heads": "1:0", "retrieval_layers": "2-3"},
            "must be of the retrieval layers 2-3, got layer 1",
        ),
        ({"retrieval_heads": "1:0", "kv_source": "shared"}, "must be 'all' unless kv_source is 'layer'"),
    ],
)
def test_impossible_heads_are_refused(llama, small, settings, message):
    with pytest.raises(InvalidArgumentError, match=message):
        MemoryDecoder(llama, None, small(**{"retrieval_layers": "all", **settings}))


@pytest.mark.parametrize("heads", ["1", "1:0,", "", "1:-1", "1:0-2"])
def test_malformed_heads_are_refused_before_there_is_a_model(heads):
    with pytest.raises(InvalidArgumentError, match="must be 'all', or K-V heads by layer such as"):
        MemoryConfig(retrieval_heads=heads)


def test_attention_with_learned_sinks_is_refused(small):
    config = GptOssConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        num_local_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=512,
        pad_token_id=0,
        attn_implementation="eager",
    )
    model = GptOssForCausalLM(config)
    with pytest.raises(InvalidArgumentError, match="retrieval_heads must be 'all' for this model"):
        MemoryDecoder(model, None, small(retrieval_heads="1:0"))
    with pytest.raises(UnsupportedModelError, match="leave retrieval_heads at 'all'"):
        score_heads(model, [torch.full((1, 60), 5)], local_window=20)
