"""Oracles 1 to 4: what decides whether retrieval attention and streaming are correct."""

from __future__ import annotations

import copy

import pytest
import torch

from memlong import MemoryDecoder

VOCABULARY = 97
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def stream(decoder, input_ids, attention_mask=None):
    """Logits of every row, [tokens, vocabulary] each, and the ids retrieved, by the segment's first token."""
    rows = [[] for _ in input_ids]
    retrieved = [{} for _ in input_ids]
    for segment in decoder.stream(input_ids, attention_mask):
        for index, row in enumerate(rows):
            real = segment.tokens[index] >= 0
            row.append(segment.logits[index][real])
            if segment.retrievals[index] is not None:
                start = int(segment.tokens[index][real][0])
                retrieved[index][start] = segment.retrievals[index].ids.tolist()
    return [torch.cat(row) for row in rows], retrieved


def plain_logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits[0]


# 1. Off means off.


def test_attached_without_streaming_the_model_is_unchanged(tiny_model, architecture, attention, small, text):
    model = tiny_model(architecture, attention)
    ids = text(30, rows=2)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits, model(ids).logits
        with MemoryDecoder(model, None, small()):
            during = model(ids, attention_mask=mask).logits, model(ids).logits
        after = model(ids, attention_mask=mask).logits, model(ids).logits
    for expected, inside, outside in zip(before, during, after, strict=True):
        assert torch.equal(expected, inside)
        assert torch.equal(expected, outside)


@pytest.mark.parametrize("beams", [1, 3])
def test_attached_without_streaming_generation_is_unchanged(tiny_model, architecture, small, text, beams):
    model = tiny_model(architecture)
    ids = text(12, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "num_beams": beams, "do_sample": False}
    expected = model.generate(ids, **options)
    with (
        MemoryDecoder(model, None, small()),
        pytest.warns(UserWarning, match=r"model.generate\(\) does not use the attached memory"),
    ):
        assert torch.equal(model.generate(ids, **options), expected)


def test_streaming_without_backend_over_a_text_inside_the_window_is_the_plain_model(
    tiny_model, architecture, attention, small, text
):
    model = tiny_model(architecture, attention)
    ids = text(20)
    with MemoryDecoder(model, None, small(backend=None)) as decoder:
        (logits,), _ = stream(decoder, ids)
    torch.testing.assert_close(logits, plain_logits(model, ids), **TOLERANCE)


def test_detached_the_model_is_the_object_it_was(tiny_model, architecture, small, text):
    model = tiny_model(architecture)

    def trace():
        hooks = {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
            for name, m in model.named_modules()
        }
        modes = [module.training for module in model.modules()]
        return hooks, copy.deepcopy(model.config.to_dict()), model.config._attn_implementation, modes

    model.train()
    model.get_input_embeddings().eval()  # as one who froze a part of it
    before = trace()
    with MemoryDecoder(model, None, small()) as decoder:
        stream(decoder, text(60))
    assert trace() == before
    with (
        pytest.raises(ValueError, match="input_ids must be from 0"),
        MemoryDecoder(model, None, small()) as decoder,
    ):
        stream(decoder, torch.full((1, 9), VOCABULARY + 1))  # leaving by an error cleans up too
    assert trace() == before


# 2. Prefix oracle: with every chunk retrieved, at its true position, streaming is full attention.


@pytest.mark.pairwise
def test_memory_of_the_whole_prefix_equals_full_attention(
    tiny_model, architecture, attention, backend, small, text
):
    model = tiny_model(architecture, attention)
    ids = text(150)
    config = small(backend=backend, position_mode="original", top_k=64, retrieval_layers="0-3")
    with MemoryDecoder(model, None, config) as decoder:
        (logits,), retrieved = stream(decoder, ids)
    assert len(retrieved[0][144]) > 25
    torch.testing.assert_close(logits, plain_logits(model, ids), **TOLERANCE)


# 3. Causality.


@pytest.mark.pairwise
@pytest.mark.parametrize("changed", [9, 50, 71])
def test_a_token_changes_nothing_before_it(
    tiny_model, architecture, attention, backend, small, text, changed
):
    model = tiny_model(architecture, attention)
    ids = text(90)
    other = ids.clone()
    other[0, changed] = (other[0, changed] + 5) % 90 + 3
    with MemoryDecoder(model, None, small(backend=backend)) as decoder:
        (logits,), retrieved = stream(decoder, ids)
        decoder.reset()
        (other_logits,), other_retrieved = stream(decoder, other)
    torch.testing.assert_close(logits[:changed], other_logits[:changed], **TOLERANCE)
    assert not torch.allclose(logits[changed:], other_logits[changed:])
    earlier = [start for start in retrieved[0] if start <= changed]
    assert [retrieved[0][start] for start in earlier] == [other_retrieved[0][start] for start in earlier]


# 4. Rows are alone.


@pytest.mark.pairwise
@pytest.mark.parametrize("position_mode", ["zero", "before-window"])
def test_a_ragged_batch_gives_each_row_what_it_gets_alone(
    tiny_model, architecture, attention, backend, small, text, position_mode
):
    model = tiny_model(architecture, attention)
    lengths = [100, 61, 13]
    ids = text(100, rows=3)
    mask = torch.stack([(torch.arange(100) >= 100 - length).long() for length in lengths])
    config = small(backend=backend, position_mode=position_mode, retrieval_layers="1-3")
    with MemoryDecoder(model, None, config) as decoder:
        together, retrieved = stream(decoder, ids, mask)
        assert len({id(bank) for bank in decoder.banks}) == 3
        together_again, retrieved_again = stream(decoder, text(30, rows=3, seed=1))
        for row, length in enumerate(lengths):
            decoder.reset()
            (alone,), (found,) = stream(decoder, ids[row : row + 1, 100 - length :])
            torch.testing.assert_close(together[row], alone, **TOLERANCE)
            assert retrieved[row] == found
            (alone,), (found,) = stream(decoder, text(30, rows=3, seed=1)[row : row + 1])
            torch.testing.assert_close(together_again[row], alone, **TOLERANCE)
            assert retrieved_again[row] == found
