"""Where retrieved keys stand, against the plain model given those very tokens at those very positions.

In a model of one layer, keys and values depend on a token and its position alone. So attention to sinks, retrieved
chunks and window must give what the plain model gives for those tokens in a row.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memlong import MemoryDecoder
from memlong.decoder.stream.positions import memory_positions, placement_of
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


def compressed(spans, window_start):
    """Positions after the sinks, where the window has 24 tokens: an eighth is 3."""
    distances = [3 * math.log1p((window_start - end) / 3) for _, end in spans]
    return [31 - round(distance) + step for distance in distances for step in (-4, -3, -2, -1)]


@pytest.mark.parametrize(
    ("mode", "gap"),
    [
        ("zero", lambda *_: [0] * 12),
        ("before-window", lambda *_: list(range(12))),
        ("overlaid", lambda *_: [0, 1, 2, 3] * 3),
        ("compressed", compressed),
    ],
)
def test_a_segment_sees_sinks_then_memory_then_window(one_layer, small, text, mode, gap):
    ids = text(200)
    with MemoryDecoder(one_layer, None, small(position_mode=mode)) as decoder:
        *_, last = decoder.stream(ids)
        (bank,) = decoder.banks
        spans = bank.retrieve(last.retrievals[0].query[None], 3).spans[0]
    start = int(last.tokens[0, 0])
    window_start = 2 + 4 * ((start - 2 - 16 + 3) // 4)  # sinks, and whole chunks gone until 16 tokens remain
    spans = sorted(spans.tolist())
    chunks = [ids[:, a:b] for a, b in spans]
    assert len(chunks) == 3
    row = torch.cat([ids[:, :2], *chunks, ids[:, window_start:]], dim=1)
    after = row.shape[1] - 14
    places = [2 + place for place in gap(spans, window_start)]
    first = {"compressed": 33}.get(mode, max(places) + 1)
    positions = [0, 1, *places, *range(first, first + after)]
    with torch.no_grad():
        expected = one_layer(row, position_ids=torch.tensor([positions])).logits[0, -last.logits.shape[1] :]
    torch.testing.assert_close(last.logits[0], expected, rtol=0.0, atol=2e-5)


def test_compressed_positions_are_in_order_however_long_the_text(small):
    config = small(position_mode="compressed")
    seen = 10**9
    ends = seen - np.array([10**9 - 4, 10**6, 10**4, 2000, 500, 100, 30, 12, 4, 0, -50])
    places = memory_positions(config, placement_of(config, seen, 44), np.stack([ends - 4, ends], axis=1))
    places = places.reshape(-1, 4)
    assert (np.diff(places, axis=1) == 1).all()
    assert (np.diff(places[:, 0]) >= 0).all()
    assert places[0, 0] == config.sink_tokens
    reach = 3 * math.exp(9)  # of a scale of 3
    assert [place == config.sink_tokens for place in places[:, 0]] == (seen - ends > reach).tolist()
    window_start = config.sink_tokens + config.memory_span(11)
    assert places[-2:, -1].tolist() == [window_start - 1] * 2  # right before the window, and of another text
    assert len({*places[4:, 0]}) > 5


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
