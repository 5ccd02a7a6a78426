"""Full attention over quantized K-V, an alternative of the benches."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from memlong.errors import InvalidArgumentError, MissingDependencyError, UnsupportedModelError


@pytest.fixture
def quantized(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    return importlib.import_module("systems.quantized")


@pytest.fixture
def quanto():
    pytest.importorskip("optimum.quanto")


def logits(decoder, ids):
    return torch.cat([segment.logits for segment in decoder.stream(ids)], dim=1)


@pytest.mark.usefixtures("quanto")
def test_what_is_not_quantized_is_full_attention(llama, small, text, quantized):
    ids = text(50)
    with torch.no_grad():
        expected = llama(ids).logits
    found = logits(quantized.TwoBits(llama, None, small(segment_size=64, local_window=96)), ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    decoder = quantized.FourBits(llama, None, small())
    decoder.read(ids)
    for layer in decoder._cache.layers:  # but for the first segment, all is in the residual
        assert layer.keys.shape[2] == 42


@pytest.mark.usefixtures("quanto")
def test_fewer_bits_are_further_from_full_attention(llama, small, text, quantized):
    ids = text(150)
    with torch.no_grad():
        expected = llama(ids).logits[:, 140:]
    far = {}
    for kind in (quantized.FourBits, quantized.TwoBits):
        found = logits(kind(llama, None, small()), ids)[:, 140:]
        far[kind.bits] = float((found - expected).norm() / expected.norm())
    assert 0 < far[4] < 0.1
    assert far[4] < far[2] < 0.6


@pytest.mark.usefixtures("quanto")
def test_text_may_come_in_parts(llama, small, text, quantized):
    ids = text(60)
    whole = quantized.FourBits(llama, None, small())
    parts = quantized.FourBits(llama, None, small())
    parts.read(ids[:, :19])
    found = list(parts.stream(ids[:, 19:]))
    assert [segment.tokens.shape[1] for segment in found] == [5, 8, 8, 8, 8, 4]
    torch.testing.assert_close(found[-1].logits, logits(whole, ids)[:, -4:], atol=0.2, rtol=0.1)


@pytest.mark.usefixtures("quanto")
def test_an_answer_leaves_the_stream_where_it_was(llama, small, text, quantized):
    ids = text(150)
    decoder, other = (quantized.FourBits(llama, None, small()) for _ in range(2))
    for each in (decoder, other):
        each.read(ids[:, :120])
    seen = []
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": []}
    said = decoder.generate(
        ids[:, 120:130],
        remember=False,
        logits_processor=[lambda ids, scores: seen.append(ids) or scores],
        **options,
    )
    assert torch.equal(said[:, :10], ids[:, 120:130])
    assert [each.shape[1] for each in seen] == [10, 11, 12, 13, 14]
    (likely,) = decoder.score(ids[:, 120:130], [said[0, 10:].tolist()])
    assert likely.is_greedy.all()
    assert torch.equal(logits(decoder, ids[:, 120:]), logits(other, ids[:, 120:]))


@pytest.mark.usefixtures("quanto")
@pytest.mark.parametrize("segment", [8, 48])
def test_bytes_are_those_that_are_held(llama, small, text, quantized, segment):
    ids = text(6 * segment + 1)
    full = 4 * 4 * 48  # bytes of a token: layers, and two heads of keys and values with 12 numbers of 4 bytes
    for kind in (quantized.FourBits, quantized.TwoBits):
        decoder = kind(llama, None, small(segment_size=segment, local_window=64))
        assert decoder.device_kv_bytes == 0
        decoder.read(ids[:, :-1])
        assert decoder.kv_read_bytes(6 * segment + 1, 4) == decoder.device_kv_bytes + full
        assert decoder.device_kv_bytes <= full * 6 * segment
    assert decoder.kv_read_bytes(segment, 4) == full * segment


@pytest.mark.usefixtures("quanto")
def test_quantized_bytes_are_a_fraction(llama, small, text, quantized):
    config = small(segment_size=128, local_window=160)
    held = {}
    for kind in (quantized.FourBits, quantized.TwoBits):
        decoder = kind(llama, None, config)
        decoder.read(text(256))
        held[kind.bits] = decoder.device_kv_bytes
    numbers = 256 * 4 * 48
    scales = numbers // 4 * 8  # the groups of this model have four numbers
    assert held == {4: numbers // 2 + scales, 2: numbers // 4 + scales}


@pytest.mark.usefixtures("quanto")
def test_a_sliding_window_is_refused(tiny_model, small, quantized):
    with pytest.raises(UnsupportedModelError, match="gemma3"):
        quantized.FourBits(tiny_model("Gemma3"), None, small())


def test_a_missing_package_is_named(llama, small, quantized, monkeypatch):
    monkeypatch.setitem(sys.modules, "optimum.quanto", None)
    with pytest.raises(MissingDependencyError, match="pip install optimum-quanto"):
        quantized.TwoBits(llama, None, small())


@pytest.mark.usefixtures("quanto")
def test_a_text_that_the_model_has_no_positions_for_is_refused(llama, small, text, quantized):
    decoder = quantized.FourBits(llama, None, small())
    with pytest.raises(InvalidArgumentError, match="positions, of which the model has 512, got 520 tokens"):
        decoder.read(text(520))
