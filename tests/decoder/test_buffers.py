"""One buffer for memory and window: what else may go on in the middle of a segment, and in which dtype."""

from __future__ import annotations

import pytest
import torch

from memlong import MemoryDecoder
from memlong.training import fit_latent_maps

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


@pytest.mark.parametrize("then", ["read", "stream", "generate"])
def test_gradients_and_then_none_in_the_middle_of_a_segment(llama, small, text, tmp_path, then):
    path = tmp_path / "maps.safetensors"
    fit_latent_maps(llama, [text(200)], dim=32, layers="2-3").save(path)
    config = small(kv_source="latent", maps=str(path), retrieval_layers="2-3")
    ids, rest = text(86), text(7, seed=1)

    def last(*, gradients):
        with MemoryDecoder(llama.requires_grad_(False), None, config) as decoder:
            for _ in decoder.stream(ids, gradients=gradients):
                pass
            if then == "generate":
                return decoder.generate(rest, max_new_tokens=6, do_sample=False)
            if then == "stream":
                return torch.cat([segment.logits for segment in decoder.stream(rest)], dim=1)
            return decoder.read(rest)

    torch.testing.assert_close(last(gradients=True), last(gradients=False), **TOLERANCE)


def test_memory_before_any_text_holds_under_autocast(tiny_model, architecture, small, text):
    model = tiny_model(architecture)

    def ask(autocast):
        with MemoryDecoder(model, None, small()) as decoder:
            decoder.read(text(90))
            decoder.reset(decoder.banks)
            decoder.read(
                text(3, seed=1)
            )  # nothing has left the window: the question is read again from its start
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return decoder.generate(
                    text(3, seed=2),
                    max_new_tokens=3,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                ).logits[0]

    torch.testing.assert_close(ask(True).float(), ask(False), rtol=0.0, atol=0.25)


def test_dropout_of_attention_is_the_models_own(llama, small, text):
    def read(seed):
        torch.manual_seed(seed)
        with MemoryDecoder(llama, None, small()) as decoder:
            for layer in llama.model.layers:
                layer.self_attn.attention_dropout = 0.5
                layer.self_attn.train()
            return decoder.read(text(60))

    assert not torch.equal(read(0), read(1))


def test_a_window_that_moves_writes_over_no_fork(llama, small, text):
    ids, question = text(100), text(5, seed=1)
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(ids)
        expected = decoder.generate(question, max_new_tokens=20, do_sample=False, remember=False)
        fork = decoder._streams.batch.fork([0, 0])
        before = fork.window.tensors()
        kept = {name: tensor.clone() for name, tensor in before.items()}
        decoder.generate(question, max_new_tokens=20, num_beams=3, do_sample=False, remember=False)
        assert all(torch.equal(tensor, kept[name]) for name, tensor in fork.window.tensors().items())
        again = decoder.generate(question, max_new_tokens=20, do_sample=False, remember=False)
    assert torch.equal(again, expected)
