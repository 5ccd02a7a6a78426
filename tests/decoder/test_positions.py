"""Where retrieved keys stand, against the plain model given those very tokens at those very positions.

In a model of one layer, keys and values depend on a token and its position alone. So attention to sinks, retrieved
chunks and window must give what the plain model gives for those tokens in a row.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memlong import MemoryDecoder
from memlong.errors import InvalidArgumentError


@pytest.fixture
def one_layer():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("mode", "gap"), [("zero", [1] * 12), ("before-window", list(range(1, 13)))])
def test_a_segment_sees_sinks_then_memory_then_window(one_layer, small, text, mode, gap):
    ids = text(200)
    with MemoryDecoder(one_layer, None, small(position_mode=mode)) as decoder:
        *_, last = decoder.stream(ids)
        (bank,) = decoder.banks
        spans = bank.retrieve(last.retrievals[0].query[None], 3).spans[0]
    start = int(last.tokens[0, 0])
    window_start = 2 + 4 * ((start - 2 - 16 + 3) // 4)  # sinks, and whole chunks gone until 16 tokens remain
    chunks = [ids[:, a:b] for a, b in sorted(spans.tolist())]
    assert len(chunks) == 3
    row = torch.cat([ids[:, :2], *chunks, ids[:, window_start:]], dim=1)
    after = row.shape[1] - 14
    positions = [0, 1] + [1 + step for step in gap] + [1 + gap[-1] + step for step in range(1, after + 1)]
    with torch.no_grad():
        expected = one_layer(row, position_ids=torch.tensor([positions])).logits[0, -last.logits.shape[1] :]
    torch.testing.assert_close(last.logits[0], expected, rtol=0.0, atol=2e-5)


def test_the_window_never_leaves_the_trained_positions(one_layer, small, text):
    seen = []
    config = small(position_mode="before-window")
    with MemoryDecoder(one_layer, None, config) as decoder:
        handle = one_layer.model.rotary_emb.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(int(kwargs["position_ids"].max())), with_kwargs=True
        )
        decoder.read(text(2000))
        handle.remove()
    assert max(seen) < config.position_span <= 64


def test_a_window_beyond_the_trained_positions_is_refused(one_layer, small):
    with pytest.raises(InvalidArgumentError, match=r"must take at most the 256 positions .* got 303"):
        MemoryDecoder(one_layer, None, small(local_window=300))


@pytest.mark.parametrize(("top_k", "mode"), [(4, "before-window"), (60, "zero")])
def test_by_default_chunks_stand_in_order_where_the_model_has_room_for_that(one_layer, small, top_k, mode):
    config = small(top_k=top_k)
    assert config.position_mode is None
    decoder = MemoryDecoder(one_layer, None, config)
    assert decoder.config.position_mode == mode
    assert decoder.config.position_span <= 256


def test_original_positions_end_where_the_models_do(one_layer, small, text):
    with MemoryDecoder(one_layer, None, small(position_mode="original")) as decoder:
        decoder.read(text(256))
        with pytest.raises(
            InvalidArgumentError, match=r"must be below 256, as the model was trained, got 263"
        ):
            decoder.read(text(20))


def test_the_same_text_costs_the_same_wherever_it_is_cut_into_calls(llama, small, text):
    ids = text(130)
    with MemoryDecoder(llama, None, small()) as decoder:
        at_once = decoder.read(ids)
        for size in (1, 5, 8, 31):
            decoder.reset()
            for piece in ids.split(size, dim=1):
                in_pieces = decoder.read(piece)
            torch.testing.assert_close(in_pieces, at_once, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_tokens_may_come_one_by_one_and_many_at_a_time_in_turns(llama, small, text, rows):
    ids = text(200, rows=rows)
    mask = torch.ones_like(ids)
    mask[1:, :11] = 0  # rows begin their segments at different columns
    with MemoryDecoder(llama, None, small()) as decoder:
        at_once = decoder.read(ids, mask)
        decoder.reset()
        sizes = [13, 60, 1, 1, 2, 20, 1, 3, 1, 5, 1, 1, 90, 1]
        for part, known in zip(ids.split(sizes, dim=1), mask.split(sizes, dim=1), strict=True):
            in_turns = decoder.read(part, known)
    torch.testing.assert_close(in_turns, at_once, rtol=0.0, atol=2e-5)
