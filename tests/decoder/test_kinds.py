"""Oracles 1 to 4 and 6, and generation, for models that are not attention layers of one shape alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import GenerationConfig

from memlong import MemoryDecoder
from memlong.architectures import Architecture, tiny_model_of
from memlong.errors import InvalidArgumentError
from tests.decoder.test_gradients import gradients_of
from tests.decoder.test_oracles import plain_logits, stream

KINDS = {
    "multimodal": ("gemma3", "Gemma3ForConditionalGeneration"),
    "multimodal, three axes of positions": ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    "cross-attention beside": ("mllama", "MllamaForConditionalGeneration"),
    "gated delta rule": ("qwen3_next", "Qwen3NextForCausalLM"),
    "convolution": ("lfm2", "Lfm2ForCausalLM"),
    "Mamba-2 and attention in one layer": ("falcon_h1", "FalconH1ForCausalLM"),
    "Mamba-2, no positions": ("granitemoehybrid", "GraniteMoeHybridForCausalLM"),
    "Mamba-2, a shared block": ("zamba2", "Zamba2ForCausalLM"),
    "shared K-V": ("gemma3n_text", "Gemma3nForCausalLM"),
    "shapes that differ": ("gemma4_text", "Gemma4ForCausalLM"),
    "latent attention": ("deepseek_v3", "DeepseekV3ForCausalLM"),
    "latent attention, complex rotation": ("deepseek_v2", "DeepseekV2ForCausalLM"),
    "latent attention and a recurrent state": ("bailing_hybrid", "BailingHybridForCausalLM"),
    "attention twice a layer": ("diffllama", "DiffLlamaForCausalLM"),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def model(request):
    model_type, class_name = request.param
    if not hasattr(transformers, class_name):
        pytest.skip(f"this release of transformers has no {model_type}")
    made = tiny_model_of(Architecture(model_type, class_name))
    made.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=2)  # as all of them end
    return made


@pytest.fixture
def close(model):
    """Equal but for rounding; of Gemma 3n's, transformers' own cache makes as much."""
    tolerance = 1e-4 if type(model).__name__ == "Gemma3nForCausalLM" else 2e-5

    def check(found, expected):
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance * scale)

    return check


def test_1_with_the_text_in_the_window_it_is_the_plain_model(model, close, small, text):
    ids = text(20)
    with MemoryDecoder(model, None, small(backend=None)) as decoder:
        (logits,), _ = stream(decoder, ids)
    close(logits, plain_logits(model, ids))


def test_1_detached_the_model_is_as_it_was(model, small, text):
    ids = text(30)
    before, config = plain_logits(model, ids), model.config.to_dict()
    implementations = [
        getattr(part, "config", None) and part.config._attn_implementation for part in model.modules()
    ]
    with MemoryDecoder(model, None, small()) as decoder:
        stream(decoder, text(60))
        inside = plain_logits(model, ids)
    assert torch.equal(inside, before)
    assert torch.equal(plain_logits(model, ids), before)
    assert model.config.to_dict() == config
    assert implementations == [
        getattr(part, "config", None) and part.config._attn_implementation for part in model.modules()
    ]


@pytest.mark.pairwise
@pytest.mark.parametrize("store", [{}, {"host": "all"}], ids=["device", "host"])
def test_2_memory_of_the_whole_prefix_is_full_attention(model, close, small, text, store):
    ids = text(130)
    config = small(position_mode="original", top_k=64, store=store)
    with MemoryDecoder(model, None, config) as decoder:
        (logits,), retrieved = stream(decoder, ids)
    assert len(retrieved[0][128]) > 20
    close(logits, plain_logits(model, ids))


def test_3_a_token_changes_nothing_before_it(model, close, small, text):
    ids = text(90)
    other = ids.clone()
    other[0, 50] = (other[0, 50] + 5) % 90 + 3
    with MemoryDecoder(model, None, small()) as decoder:
        (logits,), _ = stream(decoder, ids)
        decoder.reset()
        (other_logits,), _ = stream(decoder, other)
    close(logits[:50], other_logits[:50])
    assert not torch.allclose(logits[50:], other_logits[50:])


def test_4_a_ragged_batch_gives_each_row_what_it_gets_alone(model, close, small, text):
    lengths = [70, 41, 3]
    ids, more = text(70, rows=3), text(21, rows=3, seed=1)
    mask = torch.stack([(torch.arange(70) >= 70 - length).long() for length in lengths])
    later = torch.ones(3, 21, dtype=torch.long)
    later[0, :5] = 0
    with MemoryDecoder(model, None, small(position_mode="before-window")) as decoder:
        together, retrieved = stream(decoder, ids, mask)
        again, retrieved_again = stream(decoder, more, later)
        for row, length in enumerate(lengths):
            decoder.reset()
            (alone,), (found,) = stream(decoder, ids[row : row + 1, 70 - length :])
            close(together[row], alone)
            assert retrieved[row] == found
            (alone,), (found,) = stream(decoder, more[row : row + 1, 5 if row == 0 else 0 :])
            close(again[row], alone)
            assert retrieved_again[row] == found


def test_4_a_text_in_pieces_is_what_it_is_in_one(model, close, small, text):
    ids = text(75)
    with MemoryDecoder(model, None, small()) as decoder:
        (whole,), _ = stream(decoder, ids)
        decoder.reset()
        parts = [stream(decoder, part)[0][0] for part in ids.split([1, 2, 9, 30, 33], dim=1)]
    close(torch.cat(parts), whole)


@pytest.mark.pairwise
@pytest.mark.parametrize("beams", [1, 3])
def test_6_saved_streams_go_on_and_answer_alike(model, small, text, tmp_path, beams):
    ids, mask = text(61, rows=2), torch.ones(2, 61, dtype=torch.long)
    mask[1, :11] = 0
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "remember": False}
    prompt = text(3, rows=2, seed=2)
    with MemoryDecoder(model, None, small()) as decoder:
        stream(decoder, ids, mask)
        decoder.save(tmp_path / "streams")
        expected = decoder.generate(prompt, **options)
        going_on, _ = stream(decoder, text(30, rows=2, seed=1))
    other = MemoryDecoder.load(tmp_path / "streams", model, None, small())
    with other:
        assert torch.equal(other.generate(prompt, **options), expected)
        found, _ = stream(other, text(30, rows=2, seed=1))
    for mine, theirs in zip(going_on, found, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.pairwise
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_over_memory_of_everything_is_the_plain_models(model, close, small, text, beams):
    ids = text(60)
    options = {"max_new_tokens": 7, "num_beams": beams, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with MemoryDecoder(model, None, small(position_mode="original", top_k=64)) as decoder:
        found = decoder.generate(ids, **options)
    assert found.sequences.tolist() == expected.sequences.tolist()
    for mine, theirs in zip(found.logits, expected.logits, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize(
    "model_type",
    ["gemma2", "gemma3_text", "olmo3", "cohere2", "exaone4", "gpt_oss", "gemma4_text", "ministral"],
)
def test_a_sliding_layer_keeps_its_own_window_however_short_the_local_one(small, text, model_type):
    model, ids = tiny_model_of(model_type), text(130)
    with MemoryDecoder(model, None, small(position_mode="original", top_k=64, local_window=16)) as decoder:
        sliding = {layer.sliding_window for layer in decoder.model_layout.layers.values()}
        (logits,), _ = stream(decoder, ids)
    assert any(window is not None and window > 16 for window in sliding)
    expected = plain_logits(model, ids)
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.pairwise
@pytest.mark.parametrize("beams", [1, 3])
def test_a_ragged_batch_says_what_its_rows_say_alone(model, small, text, beams):
    ids, mask = text(50, rows=2), torch.ones(2, 50, dtype=torch.long)
    mask[1, :17] = 0
    options = {"max_new_tokens": 7, "min_new_tokens": 7, "num_beams": beams, "do_sample": False}
    with MemoryDecoder(model, None, small()) as decoder:
        together = decoder.generate(ids, attention_mask=mask, **options)[:, 50:]
        for row, start in enumerate((0, 17)):
            decoder.reset()
            alone = decoder.generate(ids[row : row + 1, start:], **options)[:, 50 - start :]
            assert together[row].tolist() == alone[0].tolist()


def test_what_is_not_remembered_leaves_no_trace(model, small, text):
    with MemoryDecoder(model, None, small()) as decoder:
        stream(decoder, text(45))
        expected, _ = stream(decoder, text(20, seed=1))
        decoder.reset()
        stream(decoder, text(45))
        decoder.generate(text(7, seed=2), max_new_tokens=9, do_sample=False, remember=False)
        found, _ = stream(decoder, text(20, seed=1))
    assert torch.equal(expected[0], found[0])


def test_gradients_come_from_each_segment(model, close, small, text):
    """As training has it: a window that went before is a constant."""
    with MemoryDecoder(model, None, small(gate_init=0.0)) as decoder:
        (expected,), _ = stream(decoder, text(40))
        decoder.reset()
        logits = []
        for segment in decoder.stream(text(40), gradients=True):
            segment.logits.sum().backward()
            logits.append(segment.logits.detach())
    close(torch.cat(logits, dim=1)[0], expected)
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_latent_attention_stores_what_the_models_own_cache_takes(small, text):
    model = tiny_model_of("deepseek_v3")
    config = model.config
    with MemoryDecoder(model, None, small()) as decoder:
        stream(decoder, text(60))
        layers, heads, _, width = decoder.layout.shape
    numbers = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    assert numbers <= 2 * layers * heads * width < numbers + 2 * width


def test_what_is_no_text_is_refused_by_name(small, text):
    model = tiny_model_of(Architecture("gemma3", "Gemma3ForConditionalGeneration"))
    model.config.image_token_id = 95
    with MemoryDecoder(model, None, small()) as decoder:
        with pytest.raises(
            InvalidArgumentError, match="pixel_values does not work with a memory, which holds text"
        ):
            decoder.generate(text(5), pixel_values=torch.zeros(1, 3, 8, 8))
        with pytest.raises(
            InvalidArgumentError, match="input_ids must be text, got 95, which stands for an image"
        ):
            decoder.read(torch.tensor([[5, 95, 6]]))
        assert decoder.tokens_read == ()


def test_a_row_may_begin_later_than_others(model, close, small, text):
    ids, mask = text(20, rows=2), torch.ones(2, 20, dtype=torch.long)
    mask[1] = 0
    with MemoryDecoder(model, None, small()) as decoder:
        stream(decoder, ids, mask)
        both, _ = stream(decoder, text(30, rows=2, seed=1))
        decoder.reset()
        (alone,), _ = stream(decoder, text(30, rows=2, seed=1)[1:])
    close(both[1], alone)


@pytest.mark.parametrize("local_window", [16, 32])
def test_a_sliding_memory_layer_keeps_its_own_window_too(small, text, local_window):
    model, ids = tiny_model_of("gemma3_text"), text(130)
    seen = []
    hook = model.model.layers[0].register_forward_hook(lambda _module, _given, output: seen.append(output))
    config = small(kv_source="shared", memory_layer=0, retrieval_layers="1,3", local_window=local_window)
    with MemoryDecoder(model, None, config) as decoder:
        assert decoder.model_layout.layers[0].sliding_window == 40
        seen.clear()
        stream(decoder, ids)
        assert len(decoder.banks[0]) > 20
        streamed = torch.cat(seen, dim=1)
    seen.clear()
    plain_logits(model, ids)
    hook.remove()
    torch.testing.assert_close(streamed, seen[0], rtol=0.0, atol=1e-4)


def test_a_sliding_layer_is_the_plain_models_from_the_first_token_over_a_given_memory(small, text):
    model, prompt = tiny_model_of("gemma3_text"), text(20, seed=1)
    with MemoryDecoder(model, None, small(position_mode="before-window")) as decoder:
        stream(decoder, text(90))
        banks = decoder.banks
        decoder.reset(banks)
        seen = []
        hook = model.model.layers[0].register_forward_hook(
            lambda _module, _given, output: seen.append(output)
        )
        stream(decoder, prompt)
        hook.remove()
    streamed, plain = torch.cat(seen, dim=1), []
    hook = model.model.layers[0].register_forward_hook(lambda _module, _given, output: plain.append(output))
    plain_logits(model, prompt)
    hook.remove()
    torch.testing.assert_close(streamed, plain[0], rtol=0.0, atol=1e-4)


def test_states_that_are_missing_or_of_another_shape_are_refused(small, text, tmp_path):
    model = tiny_model_of("qwen3_next")
    with MemoryDecoder(model, None, small()) as decoder:
        stream(decoder, text(40))
        batch = decoder._streams.batch
        tensors, facts = batch.tensors(), [stream.facts() for stream in batch.streams]
    name = next(name for name in tensors if name.startswith("states.") and ".recurrent." in name)
    for changed in (
        {k: v for k, v in tensors.items() if k != name},
        {**tensors, name: tensors[name][..., :1]},
    ):
        with MemoryDecoder(model, None, small()) as other:
            batch = other._streams.for_rows(1)
            with pytest.raises((KeyError, ValueError)):
                batch.restore(facts, changed)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # newer transformers have another name for it
def test_gradient_checkpointing_changes_no_gradient(model, close, small, text):
    if not model.supports_gradient_checkpointing:
        pytest.skip("this model has no gradient checkpointing")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with MemoryDecoder(model, None, small(gate_init=0.5)) as decoder:
        losses, expected = gradients_of(decoder, text(60), checkpointed=False, together=True)
        again, found = gradients_of(decoder, text(60), checkpointed=True, together=True)
    close(again, losses)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        close(found[name], gradient)


def test_flush_stores_what_would_have_left_the_window(model, close, small, text):
    ids, later = text(50), text(60, seed=1)
    with MemoryDecoder(model, None, small()) as decoder:
        decoder.read(ids)
        (bank,) = decoder.banks
        decoder.flush()
        decoder.reset()
        decoder.read(torch.cat([ids, later], dim=1))
        (whole,) = decoder.banks
        found, expected = bank.fetch(bank.ids), whole.fetch(bank.ids)
        assert len(bank) == 12
    assert torch.equal(found.spans, expected.spans)
    close(found.keys, expected.keys)
    close(found.values, expected.values)
