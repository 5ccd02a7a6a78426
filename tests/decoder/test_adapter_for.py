"""Adapters that act only where memory is read: elsewhere the model is the plain one."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers

from memlong import MemoryDecoder
from memlong.decoder.persistence.fingerprint import differences, origin_of
from memlong.errors import MemlongError, UnsupportedModelError
from memlong.testing.models import VOCABULARY

# transformers has a new name for it, which its lowest version that memlong supports lacks.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

QUERY = [5, 6, 7]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture
def adapted(tiny_model):
    """The model inside a PeftModel whose adapter, by default LoRA, changes what it predicts."""

    def make(architecture="Llama", **changes):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes}
            return peft.get_peft_model(tiny_model(architecture), peft.LoraConfig(**config))

    return make


@pytest.fixture
def on_demand(small):
    def make(**changes):
        return small(**{"adapter_for": "memory", "retrieve_for": "answers", "focus_tokens": 0, **changes})

    return make


def read(decoder, ids):
    return torch.cat([segment.logits for segment in decoder.stream(ids)], dim=1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dora": True},
        {"target_modules": ["embed_tokens", "o_proj"]},
        {"trainable_token_indices": [3, 4]},
    ],
)
def test_without_memory_the_model_is_the_plain_one(adapted, tiny_model, on_demand, text, changes):
    ids = text(100, rows=2)
    with MemoryDecoder(adapted(**changes), None, on_demand()) as decoder:
        mine, stored = read(decoder, ids), decoder.banks[0].fetch(decoder.banks[0].ids)
    with MemoryDecoder(tiny_model(), None, on_demand(adapter_for="all")) as plain:
        assert torch.equal(mine, read(plain, ids))
        theirs = plain.banks[0].fetch(plain.banks[0].ids)
    assert torch.equal(stored.keys, theirs.keys)


@pytest.mark.parametrize("backend", ["torch", None], ids=["an empty bank", "the plain window"])
def test_an_empty_memory_and_no_memory_are_alike(adapted, tiny_model, small, text, backend):
    ids = text(20)  # nothing has left the window
    with MemoryDecoder(adapted(), None, small(backend=backend, adapter_for="memory")) as decoder:
        mine = read(decoder, ids)
    with MemoryDecoder(tiny_model(), None, small(backend=None)) as plain:
        assert torch.equal(mine, read(plain, ids))


def test_a_question_is_read_with_the_adapter_over_a_window_without_it(adapted, on_demand, text):
    ids, question = text(96), text(8, seed=1)
    model = adapted()
    with MemoryDecoder(model, None, on_demand()) as decoder:
        decoder.read(ids)
        asked = decoder.preview(question, queries=[QUERY])
        unasked = decoder.preview(question)
    with MemoryDecoder(model, None, on_demand(adapter_for="all")) as decoder:
        with model.disable_adapter():
            decoder.read(ids)
            plain = decoder.preview(question)
        always = decoder.preview(question, queries=[QUERY])
    assert asked.retrievals[0] is not None
    assert unasked.retrievals[0] is None
    assert torch.equal(asked.logits, always.logits)
    assert torch.equal(unasked.logits, plain.logits)
    assert not torch.allclose(asked.logits, plain.logits, atol=1e-2)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_rows_that_ask_and_rows_that_do_not_are_each_as_alone(adapted, on_demand, text, order):
    ids, question = text(96, rows=3), text(8, rows=3, seed=1)
    queries = [QUERY, None, [8, 9]]
    model = adapted()
    with MemoryDecoder(model, None, on_demand()) as decoder:
        decoder.read(ids[order])
        together = decoder.preview(question[order], queries=[queries[row] for row in order]).logits
    for place, row in enumerate(order):
        with MemoryDecoder(model, None, on_demand()) as decoder:
            decoder.read(ids[row : row + 1])
            alone = decoder.preview(question[row : row + 1], queries=[queries[row]]).logits
        torch.testing.assert_close(together[place : place + 1], alone)


def test_an_answer_is_generated_with_the_adapter(adapted, on_demand, text):
    ids, question = text(96), text(6, seed=1)  # short enough to be read again as a whole
    model = adapted()
    options = {
        "min_new_tokens": 9,
        "max_new_tokens": 9,
        "do_sample": False,
        "remember": False,
        "pad_token_id": 0,
    }
    answers = {}
    for acts in ("memory", "all"):
        with MemoryDecoder(model, None, on_demand(adapter_for=acts)) as decoder:
            with model.disable_adapter() if acts == "all" else torch.no_grad():
                decoder.read(ids)
            answers[acts] = decoder.generate(question, **options)
    assert torch.equal(answers["memory"], answers["all"])


@pytest.mark.parametrize("asking", [[QUERY, QUERY], [QUERY, None]], ids=["all rows ask", "one row asks"])
def test_gradients_are_the_same_when_layers_run_again(adapted, on_demand, text, asking):
    ids, question = text(96, rows=2), text(8, rows=2, seed=1)
    found = {}
    for again in (False, True):
        model = adapted()
        weights = {name: each for name, each in model.named_parameters() if each.requires_grad}
        with MemoryDecoder(model, None, on_demand()) as decoder:
            decoder.read(ids)
            if again:
                model.gradient_checkpointing_enable()
                decoder.model.train()
            (segment,) = decoder.stream(question, queries=asking, gradients=True)
            decoder.read(text(8, rows=2, seed=2))  # the window has moved on
            segment.logits.square().mean().backward()
        found[again] = {name: each.grad for name, each in weights.items()}
    assert any(each.abs().max() > 0 for each in found[False].values())
    for name, each in found[False].items():
        torch.testing.assert_close(found[True][name], each)


def test_rows_without_memory_teach_the_adapter_nothing(adapted, on_demand, text):
    model = adapted()
    with MemoryDecoder(model, None, on_demand()) as decoder:
        decoder.read(text(96, rows=2))
        (segment,) = decoder.stream(text(8, rows=2, seed=1), queries=[QUERY, None], gradients=True)
        segment.logits[1].sum().backward(retain_graph=True)
        assert not any(each.grad.any() for each in model.parameters() if each.grad is not None)
        segment.logits[0].sum().backward()
    assert any(each.grad.any() for each in model.parameters() if each.grad is not None)


def test_afterwards_the_adapter_acts_as_before(adapted, on_demand, text):
    ids, model = text(12), adapted()
    before = model(ids).logits
    with MemoryDecoder(model, None, on_demand()) as decoder:
        read(decoder, ids)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(ids).logits, before)
        with torch.no_grad():
            for name, each in copied.named_parameters():
                if "lora_" in name:
                    each.zero_()
        assert not torch.equal(copied(ids).logits, before)  # of its own weights
    assert torch.equal(model(ids).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_when_an_adapter_acts_is_part_of_what_chunks_depend_on(adapted, llama, small):
    always, on_demand, plain = (
        MemoryDecoder(model, None, small(adapter_for=acts)).fingerprint()
        for model, acts in ((adapted(), "all"), (adapted(), "memory"), (llama, "memory"))
    )
    origins = [
        origin_of(MemoryDecoder(adapted(), None, small(adapter_for=acts))._setup)
        for acts in ("all", "memory")
    ]
    assert origins[1] == {**origins[0], "adapter_for": "memory"}
    assert differences(on_demand, always) == ["adapter_for ('all' when it was saved, 'memory' now)"]
    assert "adapter_for" not in plain


def test_what_is_no_layer_around_another_is_refused(adapted, on_demand):
    with pytest.raises(UnsupportedModelError, match=r"adapter_for must be 'all' .* no layer around another"):
        MemoryDecoder(adapted(modules_to_save=["lm_head"]), None, on_demand()).__enter__()


def test_a_merged_adapter_is_refused_and_the_model_stays_as_it_was(adapted, on_demand, small, text):
    model = adapted()
    model.merge_adapter()
    decoder = MemoryDecoder(model, None, on_demand())
    with pytest.raises(UnsupportedModelError, match="it is merged into the weights"):
        decoder.__enter__()
    model.unmerge_adapter()
    with decoder:
        read(decoder, text(40))


@pytest.mark.parametrize(
    "changes", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "all"}]
)
def test_an_adapter_that_changed_the_model_itself_is_refused(adapted, on_demand, changes):
    with pytest.raises(UnsupportedModelError, match="cannot be left out of a forward call: it has"):
        MemoryDecoder(adapted(**changes), None, on_demand()).__enter__()


def other(**changes):
    return peft.LoraConfig(**{"target_modules": ["k_proj"], "init_lora_weights": False, **changes})


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.add_adapter("other", other()),
        lambda model: model.merge_adapter(),
        lambda model: model.merge_and_unload(),
    ],
    ids=["added", "merged", "unloaded"],
)
def test_adapters_that_are_changed_inside_are_refused(adapted, on_demand, text, change):
    model = adapted()
    with MemoryDecoder(model, None, on_demand()) as decoder:
        decoder.read(text(40))
        change(model)
        with pytest.raises(MemlongError, match="adapters were changed inside `with decoder:`"):
            decoder.read(text(8))


def test_one_that_is_switched_on_inside_acts_with_memory_alone(adapted, tiny_model, on_demand, text):
    model, ids = adapted(), text(96)
    with MemoryDecoder(tiny_model(), None, on_demand()) as decoder:
        plain = read(decoder, ids)
    with model.disable_adapter():
        decoder = MemoryDecoder(model, None, on_demand())
        decoder.__enter__()
    assert torch.equal(read(decoder, ids), plain)
    decoder.__exit__(None, None, None)


def test_an_adapter_that_is_not_active_may_be_of_any_kind(adapted, tiny_model, on_demand, text):
    model, ids = adapted(), text(40)
    model.add_adapter("other", other(modules_to_save=["lm_head"]))
    with (
        MemoryDecoder(model, None, on_demand()) as decoder,
        MemoryDecoder(tiny_model(), None, on_demand()) as plain,
    ):
        assert torch.equal(read(decoder, ids), read(plain, ids))


def test_adapters_around_adapters_act_and_do_not(tiny_model, on_demand, text):
    kinds = {
        "lora": peft.LoraConfig(**other(target_modules=["q_proj"]).to_dict()),
        "loha": peft.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False),
    }
    model = peft.PeftMixedModel(tiny_model(), kinds["lora"], "lora")
    model.add_adapter("loha", kinds["loha"])
    model.set_adapter(["lora", "loha"])
    ids, question = text(96, rows=2), text(8, rows=2, seed=1)
    with (
        MemoryDecoder(model, None, on_demand()) as decoder,
        MemoryDecoder(tiny_model(), None, on_demand()) as plain,
    ):
        assert torch.equal(read(decoder, ids), read(plain, ids))
        asked, unasked = (each.preview(question, queries=[QUERY, None]).logits for each in (decoder, plain))
    torch.testing.assert_close(asked[1], unasked[1])
    assert not torch.allclose(asked[0], unasked[0], atol=1e-2)


@pytest.mark.parametrize("changes", [{"attended_tokens": 4}, {"retrieval_layers": "2"}, {"gate_init": -1.0}])
def test_other_settings_of_memory_change_nothing_of_that(adapted, tiny_model, on_demand, text, changes):
    ids, question = text(96, rows=2), text(8, rows=2, seed=1)
    model = adapted()
    with MemoryDecoder(model, None, on_demand(**changes)) as decoder:
        decoder.read(ids)
        asked = decoder.preview(question, queries=[QUERY, None]).logits
    with MemoryDecoder(model, None, on_demand(adapter_for="all", **changes)) as decoder:
        with model.disable_adapter():
            decoder.read(ids)
            plain = decoder.preview(question, queries=[QUERY, None]).logits
        always = decoder.preview(question, queries=[QUERY, None]).logits
    torch.testing.assert_close(asked[0], always[0])
    torch.testing.assert_close(asked[1], plain[1])


def test_beams_of_rows_that_ask_are_those_of_each_row_alone(adapted, on_demand, text):
    ids, question = text(96, rows=2), text(6, rows=2, seed=1)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "remember": False, "pad_token_id": 0}
    model = adapted()
    with MemoryDecoder(model, None, on_demand()) as decoder:
        decoder.read(ids)
        together = decoder.generate(question, **options)
    for row in range(2):
        with MemoryDecoder(model, None, on_demand()) as decoder:
            decoder.read(ids[row : row + 1])
            alone = decoder.generate(question[row : row + 1], **options)
        assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()


def test_a_saved_stream_goes_on_alike(adapted, on_demand, text, tmp_path):
    model, question = adapted(), text(8, seed=1)
    with MemoryDecoder(model, None, on_demand()) as decoder:
        decoder.read(text(96))
        decoder.save(tmp_path)
        expected = decoder.preview(question, queries=[QUERY]).logits
    with MemoryDecoder.load(tmp_path, model, None, on_demand()) as decoder:
        assert torch.equal(decoder.preview(question, queries=[QUERY]).logits, expected)


def test_a_layer_that_is_not_given_rows_is_refused_where_they_differ(on_demand, text):
    config = transformers.Qwen2MoeConfig(
        **SIZES,
        num_experts=2,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )
    mixture = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = peft.get_peft_model(mixture, peft.LoraConfig(target_modules=["shared_expert_gate"]))
    with MemoryDecoder(model, None, on_demand()) as decoder:
        decoder.read(text(96, rows=2))
        decoder.preview(text(8, rows=2), queries=[QUERY, QUERY])
        with pytest.raises(
            UnsupportedModelError, match=r"one by one .* 'model.layers.0.mlp.shared_expert_gate'"
        ):
            decoder.preview(text(8, rows=2), queries=[QUERY, None])
        decoder.read(text(8, rows=2))  # as if nothing had been asked
