"""Models that peft has wrapped: memory attaches to what is inside, and knows which adapter made it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers

from memlong import MemoryDecoder
from memlong.decoder.persistence.fingerprint import differences
from memlong.errors import InvalidArgumentError, SnapshotError, UnsupportedModelError

# peft asks transformers under a name that is going.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def lora(**changes):
    return peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes})


@pytest.fixture
def adapted(tiny_model):
    """A model with an adapter, by default one of LoRA, of random weights."""

    def make(config=None, seed=0, **options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = peft.get_peft_model(tiny_model(), config or lora(), **options)
            with torch.no_grad():
                for _, parameter in sorted(model.named_parameters()):
                    if parameter.requires_grad:  # many kinds begin as no change at all
                        parameter += 0.1 * torch.randn(parameter.shape)
        return model

    return make


@pytest.fixture
def told(small):
    def make(model):
        return json.loads(json.dumps(MemoryDecoder(model, None, small()).fingerprint()))

    return make


def logits(model, small, ids):
    with MemoryDecoder(model, None, small()) as decoder:
        return decoder.read(ids)


KINDS = {
    "LoRA": lora(),
    "DoRA": lora(use_dora=True),
    "of embeddings": lora(target_modules=["embed_tokens"]),
    "of tokens": lora(trainable_token_indices=[3, 4]),
    "with embeddings": lora(modules_to_save=["embed_tokens"]),
    "IA3": peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    "LoHa": peft.LoHaConfig(target_modules=["k_proj"]),
    "VeRA": peft.VeraConfig(target_modules=["q_proj"]),
    "OFT": peft.OFTConfig(target_modules=["k_proj"], oft_block_size=8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_model_reads_and_answers_as_the_model_inside(adapted, small, text, kind):
    model = adapted(KINDS[kind])
    with MemoryDecoder(model, None, small(local_window=64)) as decoder:
        answer = decoder.generate(text(20), max_new_tokens=5, do_sample=False)
    expected = model.generate(input_ids=text(20), max_new_tokens=5, do_sample=False)
    assert torch.equal(answer, expected)
    assert decoder.model is model.base_model.model


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_knows_the_adapter_and_the_model_apart(adapted, tiny_model, told, kind):
    before, model = told(tiny_model()), adapted(KINDS[kind])
    with_it = told(model)
    assert [
        each.partition(" (none when it was saved, 'default' ")[0] for each in differences(with_it, before)
    ] == ["adapters"]
    with model.disable_adapter():
        assert differences(told(model), before) == []
    assert differences(told(adapted(KINDS[kind])), with_it) == []
    assert differences(told(adapted(KINDS[kind], seed=1)), with_it)


def test_a_memory_made_with_an_adapter_is_refused_without_it(adapted, tiny_model, small, text, tmp_path):
    decoder = MemoryDecoder(adapted(), None, small())
    with decoder:
        decoder.read(text(90))
    decoder.save(tmp_path)
    assert MemoryDecoder.load(tmp_path, adapted(), None, small()).tokens_read == (90,)
    with pytest.raises(SnapshotError, match=r"adapters \('default' \w{8} when it was saved, none now\)"):
        MemoryDecoder.load(tmp_path, tiny_model(), None, small())


def test_a_changed_scaling_is_another_adapter(adapted, told):
    before, model = told(adapted()), adapted()
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)
    assert [each.partition(" ")[0] for each in differences(told(model), before)] == ["adapters"]


def test_of_several_adapters_those_at_work_count(adapted, told):
    before, model = told(adapted()), adapted()
    torch.manual_seed(1)
    model.add_adapter("other", lora())
    assert differences(told(model), before) == []
    model.set_adapter("other")
    said = differences(told(model), before)
    assert len(said) == 1
    assert "'other'" in said[0]
    model.base_model.set_adapter(["default", "other"])
    assert told(model)["adapters"].keys() == {"default", "other"}


def test_adapters_of_several_kinds_at_once(adapted, tiny_model, told):
    model = adapted(mixed=True)
    model.add_adapter("other", KINDS["LoHa"])
    model.set_adapter(["default", "other"])
    said = told(model)
    assert said["adapters"].keys() == {"default", "other"}
    assert said["weights"] == told(tiny_model())["weights"]


def test_a_name_is_no_other_adapter(adapted, told):
    assert differences(told(adapted(adapter_name="mine")), told(adapted())) == []


def test_a_merged_adapter_is_part_of_the_weights(adapted, tiny_model, told, small, text):
    model = adapted()
    expected = logits(model, small, text(60))
    model.base_model.merge_adapter()
    merged = told(model)
    assert merged["adapters"] == {}
    assert differences(merged, told(tiny_model())) == ["weights"]
    torch.testing.assert_close(logits(model, small, text(60)), expected, rtol=1e-4, atol=1e-4)
    assert differences(told(adapted().merge_and_unload()), merged) == []


def test_an_adapter_of_transformers_own_is_the_same(adapted, tiny_model, told, small, text):
    wrapped, model = adapted(), tiny_model()
    model.add_adapter(lora(), adapter_name="own")
    own = {name.replace(".own.", ".default."): each for name, each in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in wrapped.base_model.model.named_parameters():
            own[name].copy_(parameter)
    assert differences(told(model), told(wrapped)) == []
    assert torch.equal(logits(model, small, text(60)), logits(wrapped, small, text(60)))
    model.disable_adapters()
    assert differences(told(model), told(tiny_model())) == []


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
        (peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PREFIX_TUNING"),
        (peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "P_TUNING"),
        (
            peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=2, task_type="CAUSAL_LM"),
            "ADAPTION_PROMPT",
        ),
        (lora(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"), "activated LoRA"),
    ],
)
def test_adapters_that_work_outside_the_layers_are_refused_by_kind(tiny_model, small, config, kind):
    model = peft.get_peft_model(tiny_model(), config)
    with pytest.raises(UnsupportedModelError, match=rf"adapter 'default' is .*{kind}"):
        MemoryDecoder(model, None, small())


def test_a_peft_model_is_saved_as_its_adapter(adapted, tiny_model, small, text, tmp_path):
    decoder = MemoryDecoder(adapted(), None, small())
    decoder.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again = MemoryDecoder.from_pretrained(tmp_path, tiny_model())
    assert torch.equal(logits(again.model, small, text(60)), logits(decoder.model, small, text(60)))


def test_of_two_adapters_at_work_none_is_saved(adapted, small, tmp_path):
    model = adapted()
    model.add_adapter("other", lora())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(InvalidArgumentError, match=r"one active adapter, got 2 \(default, other\)"):
        MemoryDecoder(model, None, small()).save_pretrained(tmp_path)


class Packed(torch.nn.Linear):
    """Like bitsandbytes' 4-bit layer on a CPU: what it computes with is changed where it is to be saved."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.weight.quant_state.packing_format_for_cpu:
            self.weight.data = self.weight.data.flip(0)
        super()._save_to_state_dict(destination, prefix, keep_vars)


def test_a_fingerprint_leaves_packed_weights_as_they_are(llama, small, told, text):
    mlp = llama.model.layers[0].mlp
    packed = Packed(48, 64, bias=False)
    packed.weight = torch.nn.Parameter(mlp.up_proj.weight.detach().clone())
    packed.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    mlp.up_proj = packed
    before = logits(llama, small, text(60))
    assert told(llama) == told(llama)
    assert torch.equal(logits(llama, small, text(60)), before)
    assert packed.weight.quant_state.packing_format_for_cpu


def quantized_by(library, folder):
    pytest.importorskip(library)
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype="float32"
    ).eval()


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_quantized_weights_are_told_from_others(tiny_model, told, small, text, tmp_path, library):
    found = []
    for seed in (0, 0, 1):
        tiny_model(seed=seed).save_pretrained(tmp_path)
        model = quantized_by(library, tmp_path)
        found.append(told(model))
        before = logits(model, small, text(60))
        assert torch.equal(logits(model, small, text(60)), before)
    assert differences(found[0], found[1]) == []
    assert differences(found[0], found[2]) == ["weights"]
    assert differences(found[0], told(tiny_model())) == ["weights"]
