"""sources(): which retrieved chunks tokens attended to, and how much."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn import functional

from memlong import MemoryDecoder, create_bank
from memlong.architectures import Architecture, tiny_model_of
from memlong.decoder.model import kernels
from memlong.errors import InvalidArgumentError, MemlongError, MissingDependencyError, UnsupportedModelError
from tests.decoder.test_kinds import KINDS

CLOSE = {"rel": 0.0, "abs": 1e-5}
MORE_KINDS = {
    **KINDS,
    "capped logits": ("gemma2", "Gemma2ForCausalLM"),
    "sinks of attention": ("gpt_oss", "GptOssForCausalLM"),
}


def weights_of(decoder, ids):
    """By retrieval layer, weights [heads, tokens, tokens] of the model alone, by its eager attention.

    The heads are those of all modules that read the layer's K-V.
    """
    model, found, calls = decoder.model, {}, {}

    def note(module, _, output):
        layers = decoder.model_layout.readers[module]
        layer = layers[calls.get(module, 0) % len(layers)]
        calls[module] = calls.get(module, 0) + 1
        found.setdefault(layer, []).append(output[1][0])

    before = model.config.get_text_config(decoder=True)._attn_implementation
    model.set_attn_implementation("eager")
    hooks = [module.register_forward_hook(note) for module in decoder.model_layout.modules]
    try:
        with torch.no_grad():
            model(ids)
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
    return {layer: torch.cat(found[layer]) for layer in decoder.retrieval_layers}


def by_span(sources, row=0):
    return {each.span: each for each in sources.chunks if each.row == row}


def agree(sources, expected, layers, row=0):
    """Whether the sources of a row are these: by span, the mass of each layer."""
    found = by_span(sources, row)
    assert {*found} == {*expected}
    for span, masses in expected.items():
        assert [*found[span].by_layer] == list(layers)
        assert [*found[span].by_layer.values()] == pytest.approx(masses, **CLOSE)
        assert found[span].mass == pytest.approx(sum(masses) / len(masses), **CLOSE)


def of_segments(decoder, weights, segments):
    """By span, masses [layers] of chunks that the tokens of these segments retrieved, when these see everything."""
    given, count, held = {}, 0, []
    for segment in segments:
        tokens = segment.tokens[0]
        count += len(tokens)
        if segment.retrievals[0] is not None:
            held = decoder.banks[0].spans_of(segment.retrievals[0].ids).tolist()
        for start, end in held:
            mine = [each[:, tokens, start:end].sum(dim=(1, 2)).mean() for each in weights.values()]
            given[start, end] = given.get((start, end), 0) + torch.stack(mine)
    return {span: (mine / count).tolist() for span, mine in given.items()}


# Masses are those of eager attention over the whole text.


@pytest.mark.parametrize("step", [None, 5])
def test_they_are_the_weights_of_full_attention(tiny_model, architecture, attention, small, text, step):
    model, ids = tiny_model(architecture, attention), text(120)
    config = small(position_mode="original", top_k=64, retrieval_layers="0-3")
    with MemoryDecoder(model, None, config) as decoder, decoder.sources() as sources:
        segments = [each for part in ids.split(step or 120, dim=1) for each in decoder.stream(part)]
        expected = of_segments(decoder, weights_of(decoder, ids), segments)
    assert len(expected) > 20
    agree(sources, expected, range(4))
    ids_of = {span: each.id for span, each in by_span(sources).items()}
    assert [list(span) for span in ids_of] == decoder.banks[0].spans_of(list(ids_of.values())).tolist()
    masses = [each.mass for each in sources.chunks]
    assert masses == sorted(masses, reverse=True)
    assert masses[0] > masses[-1] > 0


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_of_other_kinds_of_attention_too(small, text, kind):
    model_type, class_name = MORE_KINDS[kind]
    if not hasattr(transformers, class_name):
        pytest.skip(f"this release of transformers has no {model_type}")
    model, ids = tiny_model_of(Architecture(model_type, class_name)), text(100)
    with MemoryDecoder(model, None, small(position_mode="original", top_k=64)) as decoder:
        with decoder.sources() as sources:
            segments = list(decoder.stream(ids))
        layers = decoder.retrieval_layers
        weights = weights_of(decoder, ids)
        expected = of_segments(decoder, weights, segments)
    agree(sources, expected, layers)
