"""What learns in training, what does not, and that it comes to something."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from memlong import MemoryDecoder
from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.training import Trainer, TrainingConfig, usual_retrieval_layers


def tensors(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before, after):
    return {
        name for name, tensor in after.items() if name in before and not torch.equal(tensor, before[name])
    }


def test_only_lora_of_upper_layers_learns(trainer):
    run = trainer()
    model = run.decoder.model
    before = tensors(model)
    run.run()
    moved = changed(before, tensors(model))
    assert moved
    assert all(".lora_" in name for name in moved)
    memory_layer, above = (
        {name.split(".")[4] for name in moved if name.startswith(f"model.layers.{layer}.self_attn.")}
        for layer in (2, 3)
    )
    assert memory_layer == {"q_proj", "o_proj"}  # its keys and values are what memory stores
    assert above == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(name.split(".")[2] in "23" for name in moved)


def test_maps_and_gates_learn_with_the_rest_frozen(trainer):
    run = trainer({"kv_source": "latent", "gate_init": 0.0}, lora_rank=0)
    model, maps, gates = run.decoder.model, run.decoder.source.maps, run.decoder.gates
    before, fixed = tensors(model), maps.encode.clone()
    start = [maps.decode.detach().clone(), gates.bias.detach().clone()]
    run.run()
    assert not changed(before, tensors(model))
    assert torch.equal(maps.encode, fixed)
    assert all(
        not torch.equal(one, other) for one, other in zip(start, (maps.decode, gates.bias), strict=True)
    )


@pytest.mark.parametrize(("wanted", "name"), [("train_maps", "maps"), ("train_gates", "gates")])
def test_what_is_not_to_learn_does_not(trainer, wanted, name):
    run = trainer({"kv_source": "latent", "gate_init": 0.0}, **{wanted: False})
    part = run.decoder.gates if name == "gates" else run.decoder.source.maps
    before = tensors(part)
    run.run()
    assert not changed(before, tensors(part))


def test_lower_layers_get_no_gradient(trainer, text):
    run = trainer()
    with run.decoder as decoder:
        *_, last = decoder.stream(text(60), gradients=True)
        last.logits.sum().backward()
    having = {name for name, parameter in decoder.model.named_parameters() if parameter.grad is not None}
    assert having
    assert all(name.split(".")[2] in "23" for name in having)


def test_shared_memory_never_goes_stale(trainer, text):
    def stored(decoder):
        with decoder:
            decoder.reset()
            logits = decoder.read(text(100))
        bank = decoder.banks[0]
        return bank.fetch(bank.ids), logits

    run = trainer({"kv_source": "shared", "memory_layer": 1, "retrieval_layers": "2-3"}, lora_targets=())
    before, first = stored(run.decoder)
    run.run()
    after, second = stored(run.decoder)
    assert torch.equal(after.keys, before.keys)
    assert torch.equal(after.values, before.values)
    assert not torch.allclose(first, second)


@pytest.mark.slow
def test_the_loss_falls_on_a_text_that_repeats(trainer, tmp_path):
    memory = {"kv_source": "layer", "retrieval_layers": "all"}
    targets = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    steps = trainer(memory, steps=60, lora_targets=targets, lora_rank=16, lr=2e-2).run()
    first, last = (sum(step.loss for step in part) / 8 for part in (steps[:8], steps[-8:]))
    assert last < 0.9 * first
    assert [step.step for step in steps] == list(range(1, 61))
    assert all(earlier.tokens < later.tokens for earlier, later in pairwise(steps))
    lines = [json.loads(line) for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [step.loss for step in steps]
    assert (tmp_path / "run" / "curve.png").stat().st_size > 1000


@pytest.mark.slow
def test_every_architecture_trains(trainer, architecture):
    memory = {"retrieval_layers": "all", "kv_source": "layer"}
    assert all(step.loss > 0 for step in trainer(memory, architecture=architecture, steps=3).run())


def test_a_warm_up_stage_trains_lower_layers_and_no_memory(trainer):
    run = trainer({"gate_init": 0.0}, steps=8, warmup_stage_steps=4)
    model = run.decoder.model
    before = tensors(model)
    after_stage = {}

    def watch(step):
        if step.step == 4:
            after_stage.update(tensors(model))
            after_stage["gates"] = run.decoder.gates.bias.detach().clone()

    run.run(progress=watch)
    lower = {
        name
        for name in before
        if ".lora_" in name and (name.split(".")[2] < "2" or ".layers.2.self_attn.k_proj" in name)
    }
    assert lower <= changed(before, after_stage)
    assert not changed(after_stage, tensors(model)) & lower
    assert changed(after_stage, tensors(model))
    assert float(after_stage["gates"].abs().sum()) == 0
    assert float(run.decoder.gates.bias.abs().sum()) > 0


def test_lora_goes_where_it_is_told(trainer):
    run = trainer(lora_targets=("q_proj", "up_proj"))
    learning = [name for name, parameter in run.decoder.model.named_parameters() if parameter.requires_grad]
    assert {name.split(".lora_")[0] for name in learning} == {
        "model.layers.2.self_attn.q_proj",
        "model.layers.3.self_attn.q_proj",
        "model.layers.3.mlp.up_proj",
    }


def test_training_begins_with_the_lora_of_another(trainer, tmp_path, text):
    """One that is hardly trained any further gives what the first gave, and one that is differs."""
    first = trainer()
    first.run()
    logits = {}
    for name, rate in (("first", None), ("same", 1e-12), ("further", 5e-3)):
        run = first
        if rate is not None:
            run = trainer(folder=name, lora=tmp_path / "run", lr=rate, steps=2)
            run.run()
        with run.decoder as decoder, torch.no_grad():
            decoder.reset()
            logits[name] = decoder.read(text(70))
    torch.testing.assert_close(logits["same"], logits["first"], rtol=1e-4, atol=1e-5)
    assert (logits["further"] - logits["first"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora_rank": 8},
            "must have rank 8, got 4: to begin with it, give",
        ),
        ({"lora_alpha": 16.0}, "must have alpha 16, got 8: to begin"),
        (
            {"lora_targets": ("up_proj",)},
            r"must have the layers to be trained, got 7 that differ, such as model\.layers\.2\.self_attn\.o_proj: to",
        ),
        (
            {"lora_rank": 0, "memory": {"gate_init": 0.0}},
            "lora_rank must be above 0 to begin with a LoRA, got 0",
        ),
    ],
)
def test_a_lora_that_is_none_of_the_settings_is_refused(trainer, tmp_path, changes, message):
    trainer(steps=1).run()
    with pytest.raises(InvalidArgumentError, match=message):
        trainer(folder="second", lora=tmp_path / "run", **changes)


@pytest.mark.parametrize(
    "changes",
    [{"use_rslora": True}, {"lora_dropout": 0.5}, {"alpha_pattern": {"layers.3.self_attn.q_proj": 99}}],
)
def test_a_lora_that_would_be_trained_otherwise_is_refused(trainer, tmp_path, changes):
    trainer(steps=1).run()
    path = tmp_path / "run" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InvalidArgumentError, match=f"must have no {next(iter(changes))}, got "):
        trainer(folder="second", lora=tmp_path / "run")


def test_a_lora_that_acts_with_memory_alone_is_not_made_to_act_always(trainer, tmp_path):
    trainer({"adapter_for": "memory"}, steps=1).run()
    with pytest.raises(InvalidArgumentError, match="adapter_for must be 'memory' to begin with the LoRA of"):
        trainer(folder="second", lora=tmp_path / "run")
    trainer({"adapter_for": "memory"}, folder="second", lora=tmp_path / "run", steps=1).run()


def test_a_folder_without_a_lora_to_begin_with_is_refused(trainer, tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"holds no memlong\.json"):
        trainer(lora=tmp_path)
    trainer(memory={"gate_init": 0.0}, steps=1, lora_rank=0).run()
    with pytest.raises(InvalidArgumentError, match="has no LoRA to begin with, as it was trained without"):
        trainer(folder="second", lora=tmp_path / "run")


def test_a_run_that_began_with_a_lora_resumes_to_the_same_losses(trainer, tmp_path):
    trainer(steps=1).run()
    again = {"lora": tmp_path / "run", "checkpoint_every": 1}
    whole = trainer(folder="whole", **again).run()

    def stop(step):
        if step.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(folder="cut", **again).run(progress=stop)
    resumed = trainer(folder="cut", **again).run(resume=True)
    assert [step.loss for step in resumed] == pytest.approx([step.loss for step in whole], abs=1e-6)
    with pytest.raises(KeyboardInterrupt):
        trainer(folder="other", checkpoint_every=1).run(progress=stop)
    with pytest.raises(InvalidArgumentError, match="lora"):
        trainer(folder="other", **again).run(resume=True)
    with pytest.raises(KeyboardInterrupt):
        trainer(folder="begun", **again).run(progress=stop)
    with pytest.raises(InvalidArgumentError, match="lora"):
        trainer(folder="begun", checkpoint_every=1).run(resume=True)


def test_a_folder_says_which_lora_its_training_began_with(trainer, tmp_path):
    trainer(steps=1).run()
    again = {"folder": "second", "steps": 1}
    begun = trainer(**again, lora=tmp_path / "run")
    begun.run()
    assert begun.ended
    assert json.loads((tmp_path / "second" / "memlong.json").read_text())["training"]["lora"]
    assert not trainer(**again).ended


def test_a_step_is_the_mean_over_the_segments_in_which_anything_counts(trainer, monkeypatch):
    """Of four segments, only the last token of the second and of the third counts."""
    run = trainer(rows=1, accumulate=4, steps=1, document_tokens=32)
    source, shares = run._source, []

    class Weighted:
        digest = source.digest

        def __getitem__(self, number):
            weights = torch.zeros(32)
            weights[[15, 23]] = 10.0
            return replace(source[number], weights=weights)

    run._source = Weighted()
    learn = Trainer._learn
    monkeypatch.setattr(Trainer, "_learn", lambda self, loss, of: shares.append(of) or learn(self, loss, of))
    run.run()
    assert shares == [2, 2]


def test_random_chunks_take_the_place_of_some(trainer, monkeypatch):
    seen = []
    stream = MemoryDecoder.stream

    def watched(self, *args, **options):
        for segment in stream(self, *args, **options):
            seen.extend(each.scores.abs().sum().item() == 0 for each in segment.retrievals if each)
            yield segment

    monkeypatch.setattr(MemoryDecoder, "stream", watched)
    trainer(random_share=0.5, steps=24).run()
    assert 0.25 < sum(seen) / len(seen) < 0.75
    seen.clear()
    trainer(folder="other").run()
    assert not any(seen)


@pytest.mark.slow
def test_long_range_tokens_weigh_more_where_it_is_wanted(trainer):
    even = trainer({"kv_source": "layer"}, steps=40).run()
    more = trainer({"kv_source": "layer"}, folder="other", steps=40, long_range_weight=20.0).run()
    assert even[0].long_range_loss == more[0].long_range_loss
    assert even[-1].long_range_loss != more[-1].long_range_loss


@pytest.mark.parametrize(
    ("memory", "changes", "words"),
    [
        ({"backend": None}, {}, "backend must be a name for training, got None"),
        ({}, {"lora_rank": 0}, "Nothing to train"),
        (
            {},
            {"lora_targets": ("query",)},
            r"lora_targets must name linear layers from layer 2 up, got \('query',\)",
        ),
        ({"memory_layer": 3}, {}, "retrieval_layers must be 3 or above"),
    ],
)
def test_what_cannot_be_trained_is_said(trainer, memory, changes, words):
    with pytest.raises(InvalidArgumentError, match=words):
        trainer(memory, **changes)


def test_the_usual_retrieval_layers(llama, small):
    assert usual_retrieval_layers(llama, small(kv_source="shared", memory_layer=1)) == "1"
    assert usual_retrieval_layers(llama, small(kv_source="layer")) == "all"


def test_too_short_documents_are_said(decoder, text, tmp_path):
    with pytest.raises(InvalidTextError, match="At least one document must have 32 tokens"):
        Trainer(decoder(), [text(5)[0]], TrainingConfig(), folder=tmp_path)


def test_float16_is_refused(llama, small, text, tmp_path):
    decoder = MemoryDecoder(llama.half(), None, small(kv_source="shared"))
    with pytest.raises(InvalidArgumentError, match="must be bfloat16 or float32 for training"):
        Trainer(decoder, [text(90)[0]], TrainingConfig(), folder=tmp_path)


def test_bfloat16_learns_in_float32_and_settles(llama, small, text, tmp_path):
    decoder = MemoryDecoder(
        llama.bfloat16(), None, small(kv_source="shared", gate_init=0.0, retrieval_layers="2-3")
    )
    config = TrainingConfig(steps=4, rows=1, document_tokens=64, lora_rank=2, warmup_steps=0)
    run = Trainer(decoder, [text(90)[0]], config, folder=tmp_path)
    learning = [parameter for parameter in llama.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in learning} == {torch.float32}
    run.run()
    assert {parameter.dtype for parameter in llama.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in llama.parameters())


def test_a_model_is_trained_once(trainer, documents, tmp_path):
    run = trainer()
    with pytest.raises(InvalidArgumentError, match="must not have an adapter"):
        Trainer(run.decoder, documents, TrainingConfig(), folder=tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"lr": 0.0}, "lr must be a number above 0, got 0.0"),
        ({"random_share": 1.5}, "random_share must be a number from 0 to 1, got 1.5"),
        ({"lora_targets": "q_proj"}, "lora_targets must be a sequence of names, got 'q_proj'"),
        ({"lr": 1e300}, r"lr must be a number above 0 and at most 1e\+30, got 1e\+300"),
        ({"gate_lr": 10**400}, "gate_lr must be a number above 0 and at most"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number of at least 0, got nan"),
        ({"lora_rank": 10**9}, "lora_rank must be an integer from 0 to 16384, got 1000000000"),
        ({"rows": 10**9}, "rows must be an integer from 1 to 4096, got 1000000000"),
        (
            {"document_tokens": 10**30},
            "document_tokens must be an integer of at least 2 and at most 9223372036854775807",
        ),
        ({"warmup_stage_steps": 4, "lora_rank": 0}, "nothing to train in that stage"),
    ],
)
def test_settings_that_cannot_be_are_said(changes, words):
    with pytest.raises(InvalidArgumentError, match=words):
        TrainingConfig(**changes)


def test_the_learning_rate_rises_and_falls():
    config = TrainingConfig(steps=100, warmup_steps=10)
    shares = [config.share_of_rate(step) for step in range(100)]
    assert shares[:11] == sorted(shares[:11])
    assert shares[10] == 1
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert 0.1 <= shares[-1] < 0.11


def test_gradient_checkpointing_changes_no_loss_and_is_off_afterwards(trainer):
    plain = trainer({"gate_init": 0.0}).run()
    run = trainer({"gate_init": 0.0}, folder="again", gradient_checkpointing=True)
    calls = []
    layer = run.decoder.model.model.layers[3].self_attn
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    before = [module.training for module in run.decoder.model.modules()]
    again = run.run()
    assert [step.loss for step in again] == pytest.approx([step.loss for step in plain], rel=1e-6)
    assert len(calls) == 2 * 12  # segments: forward, and again in the backward pass
    assert not any(getattr(module, "gradient_checkpointing", False) for module in run.decoder.model.modules())
    assert [module.training for module in run.decoder.model.modules()] == before
