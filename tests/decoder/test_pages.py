"""Page choice: what single tokens attend to of the memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from memlong import MemoryDecoder
from memlong.decoder.model.pages import PageBudget, Sketch, attend_to_pages, choose_pages
from memlong.errors import UnsupportedModelError

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
ROWS, KV_HEADS, GROUP, MEMORY, LOCAL, WIDTH = 2, 3, 2, 64, 10, 8


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(ROWS, KV_HEADS * GROUP, 1, WIDTH, generator=generator)
    key, value = torch.randn(2, ROWS, KV_HEADS, MEMORY + LOCAL, WIDTH, generator=generator)
    return query, key, value


def hidden(tokens):
    bias = torch.zeros(ROWS, 1, 1, MEMORY + LOCAL)
    bias[1, :, :, MEMORY - tokens : MEMORY] = torch.finfo(torch.float32).min
    return bias


@pytest.mark.parametrize("bias", [None, hidden(20), torch.linspace(-2, 0, 6).view(1, 6, 1, 1) + hidden(20)])
def test_a_budget_for_everything_is_plain_attention(states, bias):
    query, key, value = states
    found = attend_to_pages(
        query, key, value, Sketch.of(key[:, :, :MEMORY]), PageBudget(MEMORY, 4), scale=0.3, bias=bias
    )
    expected = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(found, expected.transpose(1, 2), **TOLERANCE)


def test_pages_are_those_with_the_most_attention_by_the_largest_channels(states):
    query, key, value = states
    budget, sketch = PageBudget(12, 4), Sketch.of(key[:, :, :MEMORY])
    bias = hidden(20)
    found = attend_to_pages(query, key, value, sketch, budget, scale=None, bias=bias)
    for row in range(ROWS):
        for head in range(KV_HEADS):
            keys, shares = key[row, head, :MEMORY], torch.zeros(MEMORY // 4)
            channels = keys.square().mean(0).topk(WIDTH // 2).indices
            queries = query[row, head * GROUP : head * GROUP + GROUP, 0] * WIDTH**-0.5
            for each in queries:
                logits = keys[:, channels] @ each[channels] + bias[row, 0, 0, :MEMORY]
                shares += logits.exp().view(-1, 4).sum(1) / logits.exp().sum()
            pages = shares.topk(3).indices
            seen = torch.cat([torch.zeros(MEMORY), torch.ones(LOCAL)]).bool()
            for page in pages:
                seen[4 * page : 4 * page + 4] = True
            expected = functional.scaled_dot_product_attention(
                queries[None], key[row, head][None, seen], value[row, head][None, seen], scale=1.0
            )
            torch.testing.assert_close(
                found[row, 0, head * GROUP : head * GROUP + GROUP], expected[0], **TOLERANCE
            )


def test_query_heads_of_a_kv_head_choose_together():
    keys = torch.eye(4).repeat_interleave(2, 0)[None, None] * 9  # page p is along channel p
    query = torch.tensor([[[[1.0, 0, 0, 0], [0, 0, 0, 1.0]]]])
    whole = Sketch(torch.arange(4).view(1, 1, 4), keys)
    assert choose_pages(query, whole, PageBudget(4, 2), None).tolist() == [[[0, 3]]]


@pytest.mark.parametrize("heads", ["all", "0:1,1:0,3:0+1"])
def test_tokens_that_are_read_alone_choose(llama, small, text, heads):
    """A budget for all is exact; less changes what follows, and nothing of what is read in segments."""
    ids = text(96)

    def read(budget, step):
        config = small(top_k=6, retrieval_heads=heads, attended_tokens=budget, gate_init=-0.1)
        with MemoryDecoder(llama, None, config) as decoder, torch.inference_mode():
            parts = ids.split(step, dim=1)
            return torch.cat([each.logits[0] for part in parts for each in decoder.stream(part)])

    plain = read(None, 1)
    torch.testing.assert_close(read(24, 1), plain, **TOLERANCE)
    assert torch.equal(read(4, 8), read(None, 8))
    assert (read(8, 1) - plain).abs().max() > 1e-3


def test_attention_that_is_not_torchs_is_refused(tiny_model, small, text):
    config = small(attended_tokens=4, top_k=6)
    with (
        MemoryDecoder(tiny_model("Llama", "eager"), None, config) as decoder,
        pytest.raises(
            UnsupportedModelError, match="attended_tokens must be None for the attention of this Llama"
        ),
    ):
        decoder.generate(text(60), max_new_tokens=3)


def test_a_ragged_batch_generates_what_each_row_does_alone(llama, small, text):
    ids, lengths = text(100, rows=2), [100, 61]
    mask = torch.stack([(torch.arange(100) >= 100 - length).long() for length in lengths])
    config = small(top_k=6, attended_tokens=8, retrieval_heads="0:1,1:0,3:0+1")
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    with MemoryDecoder(llama, None, config) as decoder:
        together = decoder.generate(ids, attention_mask=mask, **options)
        for row, length in enumerate(lengths):
            decoder.reset()
            alone = decoder.generate(ids[row : row + 1, 100 - length :], **options)
            assert torch.equal(together[row, 100:], alone[0, length:])


def test_pages_divide_chunks():
    assert PageBudget.of(256, 128) == PageBudget(256, 16)
    assert PageBudget.of(256, 24) == PageBudget(256, 8)
    assert PageBudget.of(5, 7) == PageBudget(5, 1)
    assert PageBudget(5, 16).pages == 1
    assert PageBudget.of(None, 128) is None
