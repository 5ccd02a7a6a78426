"""Each token's own nearest keys, an alternative of the benches."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from memlong.errors import UnsupportedModelError


@pytest.fixture
def nearest(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    return importlib.import_module("systems.nearest").NearestKeys


def logits(decoder, ids):
    return torch.cat([segment.logits for segment in decoder.stream(ids)], dim=1)


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_all_keys_are_full_attention(tiny_model, small, text, nearest, name):
    model, ids = tiny_model(name), text(60)
    with torch.no_grad():
        expected = model(ids).logits
    usual = model.config._attn_implementation
    decoder = nearest(model, None, small(top_k=16, chunk_size=4))
    torch.testing.assert_close(logits(decoder, ids), expected, atol=1e-4, rtol=1e-4)
    assert model.config._attn_implementation == usual
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected)


def test_each_token_and_head_chooses_the_largest_logits(nearest):
    import systems.nearest as module

    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 12, 8, generator=random) for heads in (4, 2, 2))
    found = module._attended(query[:, :, 9:], key, value, near=3, sinks=1, nearest=2)
    for head in range(4):
        scores = query[0, head, 9:] @ key[0, head // 2].T * 8**-0.5
        for row, end in enumerate((9, 10, 11)):
            far = sorted(range(1, end - 2), key=lambda place: -scores[row, place].item())[:2]
            kept = [0, *far, *range(end - 2, end + 1)]
            expected = scores[row, kept].softmax(0) @ value[0, head // 2, kept]
            torch.testing.assert_close(found[0, row, head], expected)


@pytest.mark.parametrize("what", ["softcap", "s_aux"])
def test_attention_with_more_to_it_is_refused(nearest, what):
    import systems.nearest as module

    states, sizes = torch.randn(3, 1, 2, 4, 8), {"near": 3, "sinks": 1, "nearest": 2}
    with pytest.raises(
        UnsupportedModelError, match=f"Nearest keys leave out {what} of this model's attention"
    ):
        module._attended(*states, **sizes, **{what: 30.0})
    assert module._attended(*states, **sizes, **{what: None}).shape == (1, 4, 2, 8)


def test_an_answer_leaves_the_stream_where_it_was(llama, small, text, nearest):
    ids = text(150)
    decoder, other = (nearest(llama, None, small()) for _ in range(2))
    for each in (decoder, other):
        each.read(ids[:, :120])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": []}
    said = decoder.generate(ids[:, 120:130], remember=False, **options)
    assert torch.equal(said[:, :10], ids[:, 120:130])
    (likely,) = decoder.score(ids[:, 120:130], [said[0, 10:].tolist()])
    assert likely.is_greedy.all()
    assert torch.equal(logits(decoder, ids[:, 120:]), logits(other, ids[:, 120:]))
    assert decoder.device_kv_bytes == 4 * 4 * 48 * 150
