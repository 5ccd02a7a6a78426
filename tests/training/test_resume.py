"""A run that was interrupted goes on as if it had not been."""

from __future__ import annotations

import json

import pytest
import torch

from memlong.decoder.persistence.fingerprint import query_facts
from memlong.decoder.retrievers.query_map import QueryMap
from memlong.errors import InvalidArgumentError, MemlongError

STEPS = 50


class CutOffError(Exception):
    """As a power cut would have it."""


def cut_off(run, at):
    def stop(step):
        if step.step == at:
            raise CutOffError

    with pytest.raises(CutOffError):
        run.run(progress=stop)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "changes"),
    [
        ({"kv_source": "shared", "gate_init": -1.0}, {"random_share": 0.3, "warmup_stage_steps": 6}),
        ({"kv_source": "latent"}, {"weight_decay": 0.1, "long_range_weight": 2.0, "warmup_steps": 8}),
        ({"kv_source": "latent"}, {"rows": 3, "negatives": 2, "contrast": 2.0, "distill": 0.5}),
    ],
)
def test_the_losses_are_those_of_an_uninterrupted_run(trainer, tmp_path, memory, changes):
    settings = {"steps": STEPS, "checkpoint_every": 7, **changes}
    whole = trainer(memory, folder="whole", **settings).run()
    cut_off(trainer(memory, folder="cut", **settings), at=29)
    (checkpoint,) = (tmp_path / "cut").glob("checkpoint-*")
    written = int(checkpoint.name.partition("-")[2])
    assert 20 <= written < 29
    torch.manual_seed(99)  # of another process
    told = []
    resumed = trainer(memory, folder="cut", **settings).run(resume=True, progress=told.append)
    assert [step.step for step in resumed] == [step.step for step in told] == list(range(1, STEPS + 1))
    assert resumed[0].seconds < resumed[-1].seconds
    for one, other in zip(resumed, whole, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-6)
        assert one.long_range_loss == pytest.approx(other.long_range_loss, abs=1e-6)
        assert one.gain == pytest.approx(other.gain, abs=1e-6)
        assert (one.tokens, one.lr) == (other.tokens, other.lr)
    lines = (tmp_path / "cut" / "curve.jsonl").read_text().splitlines()
    assert len(lines) == STEPS
    assert not list((tmp_path / "cut").glob("*checkpoint*"))


def test_a_checkpoint_is_safetensors_and_json(trainer, tmp_path):
    cut_off(trainer(steps=20, checkpoint_every=4), at=19)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert {file.name for file in checkpoint.iterdir()} == {"training.safetensors", "training.json"}
    facts = json.loads((checkpoint / "training.json").read_text())
    assert facts["progress"]["step"] < 20
    assert not [
        file for file in (tmp_path / "run").iterdir() if file.suffix in (".pt", ".bin", ".pth", ".pkl")
    ]
    assert not list((tmp_path / "run").glob(".checkpoint*"))


def test_a_last_line_that_was_cut_off_is_made_again(trainer, tmp_path):
    settings = {"steps": 20, "checkpoint_every": 4}
    cut_off(trainer(**settings), at=15)
    with (tmp_path / "run" / "curve.jsonl").open("a") as file:
        file.write('{"step": 16, "lo')
    assert len(trainer(**settings).run(resume=True)) == 20


def test_what_cannot_be_resumed_is_said(trainer, tmp_path):
    with pytest.raises(InvalidArgumentError, match="has no checkpoint to resume from"):
        trainer().run(resume=True)
    cut_off(trainer(steps=20, checkpoint_every=4), at=19)
    with pytest.raises(InvalidArgumentError, match="has the checkpoint of an unfinished run"):
        trainer(steps=20).run()
    with pytest.raises(InvalidArgumentError, match=r"lr must be 0.005, .* got 0.001"):
        trainer(steps=20, lr=1e-3).run(resume=True)
    with pytest.raises(InvalidArgumentError, match=r"memory.top_k must be 3, .* got 2"):
        trainer({"top_k": 2}, steps=20).run(resume=True)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    weights = checkpoint / "training.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InvalidArgumentError, match=r"Cannot read the checkpoint|must have the checkpoint"):
        trainer(steps=20).run(resume=True)


def test_another_model_is_not_resumed(trainer, tmp_path):
    cut_off(trainer(steps=20, checkpoint_every=4), at=19)
    run = trainer(steps=20)
    run._fingerprint["weights"] = "of another"
    with pytest.raises(InvalidArgumentError, match=r"model.weights must be"):
        run.run(resume=True)


def test_a_field_that_a_release_of_transformers_adds_is_no_other_model(trainer):
    cut_off(trainer(steps=6, checkpoint_every=4), at=5)
    run = trainer(steps=6)
    run._fingerprint["config"]["of_tomorrow"] = True
    assert len(run.run(resume=True)) == 6


def test_another_configuration_is_not_resumed(trainer):
    cut_off(trainer(steps=6, checkpoint_every=4), at=5)
    run = trainer(steps=6)
    run._fingerprint["config"]["rms_norm_eps"] = 0.1
    with pytest.raises(InvalidArgumentError, match=r"model\.config\.rms_norm_eps must be 1e-06, .* got 0\.1"):
        run.run(resume=True)


def test_a_damaged_checkpoint_or_curve_is_said(trainer, tmp_path):
    cut_off(trainer(steps=20, checkpoint_every=4), at=19)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    curve, facts = tmp_path / "run" / "curve.jsonl", checkpoint / "training.json"
    for path, damage in (
        (facts, "[]"),
        (facts, "{}"),
        (facts, facts.read_text().replace('.exp_avg"', '.other"', 1)),
        (curve, "[]\n"),
        (curve, curve.read_text().partition("\n")[2]),
    ):
        whole = path.read_text()
        path.write_text(damage)
        with pytest.raises(
            InvalidArgumentError, match=r"Cannot read the checkpoint|must have the checkpoint"
        ):
            trainer(steps=20).run(resume=True)
        path.write_text(whole)
    assert len(trainer(steps=20).run(resume=True)) == 20


def test_a_run_with_a_query_map_goes_on_wherever_the_map_is(trainer, tmp_path):
    plain = trainer(folder="plain").decoder
    made_for = query_facts(plain.config, plain.retriever, plain.model)
    for name, seed in (("first", 0), ("same", 0), ("other", 1)):
        QueryMap.identity(plain.retriever.dim, 2, made_for=made_for, seed=seed).save(tmp_path / name)

    def with_map(name):
        return trainer({"query_map": str(tmp_path / name)}, steps=8, checkpoint_every=2)

    cut_off(with_map("first"), at=7)
    with pytest.raises(InvalidArgumentError, match="query_map"):
        with_map("other").run(resume=True)
    with pytest.raises(InvalidArgumentError, match="query_map"):
        trainer(steps=8, checkpoint_every=2).run(resume=True)
    run = with_map("same")
    run.run(resume=True)
    assert run.ended
    assert with_map("first").ended


def test_a_run_that_has_ended_stays(trainer, tmp_path):
    run = trainer(steps=2)
    run.run()
    assert run.ended
    with pytest.raises(InvalidArgumentError, match="This trainer is done"):
        run.run()
    for resume in (False, True):
        with pytest.raises(InvalidArgumentError, match="the trained decoder of a complete run"):
            trainer(steps=2).run(resume=resume)
    assert len((tmp_path / "run" / "curve.jsonl").read_text().splitlines()) == 2
    assert not trainer(steps=3).ended


def test_a_run_that_diverges_stops(trainer, tmp_path):
    run = trainer(steps=4)
    next(iter(run._parts.parameters.values())).data.fill_(float("nan"))
    with pytest.raises(MemlongError, match="diverged in step 1"):
        run.run()
    assert not (tmp_path / "run" / "memlong.json").exists()


def test_episodes_too_short_for_a_memory_are_refused(trainer):
    with pytest.raises(InvalidArgumentError, match="document_tokens must be at least 32"):
        trainer(document_tokens=31)


def test_a_run_that_does_not_say_when_its_adapter_acts_is_of_one_that_always_does(trainer, tmp_path):
    """As of a memlong that had no such setting."""
    assert "memory.adapter_for" not in trainer()._made_of()
    assert trainer({"adapter_for": "memory"}, folder="other")._made_of()["memory.adapter_for"] == "memory"
    run = trainer(steps=1)
    run.run()
    path = tmp_path / "run" / "memlong.json"
    facts = json.loads(path.read_text())
    del facts["memory"]["adapter_for"]
    path.write_text(json.dumps(facts))
    assert run.ended
