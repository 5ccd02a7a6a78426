"""What a run does to its folder: it loses nothing of its own, and touches nothing of others."""

from __future__ import annotations

import errno
import hashlib
import json
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from memlong.errors import InvalidArgumentError, StorageError
from memlong.training import Trainer, TrainingConfig
from memlong.training import checkpoint as checkpoint_module

QUICK = {"rows": 2, "document_tokens": 64, "accumulate": 2, "warmup_steps": 0, "lora_rank": 4}
SETTINGS = {"steps": 20, "checkpoint_every": 4}


class CutOffError(Exception):
    """As a power cut would have it."""


@pytest.fixture
def cut(trainer, tmp_path):
    """The checkpoint of a run that was cut off after a step, 12 unless another is given."""

    def make(at=12):
        def stop(step):
            if step.step == at:
                raise CutOffError

        with pytest.raises(CutOffError):
            trainer(**SETTINGS).run(progress=stop)
        (found,) = (tmp_path / "run").glob("checkpoint-*")
        return found

    return make


def make_link(path):
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "training.json").write_text('{"format": "memlong-checkpoint-4"}')
    path.symlink_to(elsewhere)


def make_file(path):
    path.write_text("mine")


def make_folder_of_another_program(path):
    path.mkdir()
    (path / "optimizer.pt").write_text("mine")


@pytest.mark.parametrize("name", ["checkpoint-3", "checkpoint-99", ".checkpoint-3.writing"])
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (make_link, "is a link"),
        (make_file, "is not a folder"),
        (make_folder_of_another_program, "has files of another program"),
    ],
)
def test_what_is_not_its_own_is_left_alone(trainer, cut, tmp_path, make, why, name):
    ours = cut()
    make(tmp_path / "run" / name)
    before = sorted(tmp_path.rglob("*"))
    for resume in (False, True):
        with pytest.raises(InvalidArgumentError, match=rf"{name}' {why}"):
            trainer(**SETTINGS).run(resume=resume)
    assert sorted(tmp_path.rglob("*")) == before
    assert ours.exists()


def test_names_that_are_like_a_checkpoints_are_left_alone(trainer, tmp_path):
    for name in ("checkpoint-03", "checkpoint-final", "checkpoint-3.bak"):
        (tmp_path / "run" / name).mkdir(parents=True)
    assert len(trainer(steps=6, checkpoint_every=1).run()) == 6
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 3


def test_what_others_put_into_a_checkpoint_stays(trainer, cut):
    note = cut() / "note.txt"
    note.write_text("mine")
    trainer(**SETTINGS).run(resume=True)
    assert [path.read_text() for path in note.parent.parent.rglob("note.txt")] == ["mine"]


@pytest.mark.parametrize(
    "name",
    [
        "curve.jsonl",
        "curve.png",
        "adapter_model.safetensors",
        "gates.safetensors",
        "null_chunk.safetensors",
        "query_map.safetensors",
        "config.json",
    ],
)
def test_a_new_run_overwrites_nothing(trainer, tmp_path, name):
    run = trainer()
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(InvalidArgumentError, match=rf"{name}' already exists"):
        run.run()
    assert (tmp_path / "run" / name).read_text() == "mine"


def test_a_new_run_writes_through_no_link(trainer, tmp_path):
    run = trainer()
    (tmp_path / "run" / "curve.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidArgumentError, match="already exists"):
        run.run()
    assert not (tmp_path / "elsewhere").exists()


def test_two_runs_in_one_folder_are_kept_apart(trainer, tmp_path):
    told = []

    def another(step):
        if step.step == 2:
            with pytest.raises(StorageError, match="is held by process") as error:
                trainer().run()
            told.append(error)

    assert len(trainer().run(progress=another)) == 6
    assert len(told) == 1
    assert not list((tmp_path / "run").glob("*lock*"))


def test_a_run_stays_in_its_folder_when_the_working_directory_changes(
    decoder, documents, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = Trainer(decoder(), documents, TrainingConfig(steps=6, checkpoint_every=1, **QUICK), folder="run")
    run.run(progress=lambda _: os.chdir(tmp_path / "there"))
    assert (tmp_path / "here" / "run" / "memlong.json").is_file()
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize("error", [SafetensorError("No space left"), OSError(errno.ENOSPC, "No space left")])
def test_a_full_disk_loses_no_checkpoint(trainer, cut, tmp_path, monkeypatch, error):
    whole = trainer(folder="whole", **SETTINGS).run()
    first = cut()

    def full(tensors, path):
        path.write_bytes(b"half of it")
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_module, "save_file", full)
        with pytest.raises(StorageError, match=r"Cannot write .*: No space left.*then resume"):
            trainer(**SETTINGS).run(resume=True)
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == [first.name]
    resumed = trainer(**SETTINGS).run(resume=True)
    assert [step.loss for step in resumed] == pytest.approx([step.loss for step in whole], abs=1e-6)


def test_a_checkpoint_that_was_being_written_is_forgotten(trainer, cut, tmp_path):
    cut()
    for name in (".checkpoint-16.writing", ".checkpoint-4.removing"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "training.safetensors").write_bytes(b"half of it")
        (tmp_path / "run" / name / ".tmpYMTdNC").write_bytes(b"half of it")
    assert len(trainer(**SETTINGS).run(resume=True)) == 20
    assert not list((tmp_path / "run").glob("*checkpoint*"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_a_curve_that_cannot_be_written_is_said(trainer, cut, tmp_path):
    cut()
    curve = tmp_path / "run" / "curve.jsonl"
    lines = curve.read_text()
    run = trainer(**SETTINGS)

    def fill(step):
        if step.step == 13:
            curve.rename(tmp_path / "kept.jsonl")
            curve.symlink_to("/dev/full")

    with pytest.raises(StorageError, match=r"Cannot write .*curve.jsonl'"):
        run.run(resume=True, progress=fill)
    curve.unlink()
    (tmp_path / "kept.jsonl").rename(curve)
    assert curve.read_text().startswith(lines[: lines.index('{"step": 9')])
    assert len(trainer(**SETTINGS).run(resume=True)) == 20


def forge(checkpoint, change):
    """Change the tensors of a checkpoint, and what its JSON says of them."""
    path, facts = checkpoint / "training.safetensors", checkpoint / "training.json"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    said = json.loads(facts.read_text())
    said["shapes"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    said["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    facts.write_text(json.dumps(said))


def first(tensors, ending, start="optimizer."):
    return next(name for name in tensors if name.startswith(start) and name.endswith(ending))


def another_shape(tensors):
    tensors[first(tensors, ".exp_avg")] = torch.zeros(3, 3)


def missing(tensors):
    del tensors[first(tensors, ".exp_avg_sq")]


def unknown(tensors):
    tensors["optimizer.of.another.exp_avg"] = torch.zeros(3)


def not_a_number(tensors):
    tensors[first(tensors, ".exp_avg")].view(-1)[0] = float("nan")


def endless(tensors):
    tensors[first(tensors, "", "parameter.")].view(-1)[0] = float("inf")


def below_zero(tensors):
    tensors[first(tensors, ".exp_avg_sq")].view(-1)[0] = -1.0


def far_ahead(tensors):
    tensors[first(tensors, ".step")].fill_(1e9)


def no_random_state(tensors):
    tensors["random.torch"] = torch.zeros(5, dtype=torch.uint8)


def vast_random_state(tensors):
    tensors["random.torch"] = torch.zeros(1 << 20, dtype=torch.uint8)


@pytest.mark.parametrize(
    "change",
    [
        another_shape,
        missing,
        unknown,
        not_a_number,
        endless,
        below_zero,
        far_ahead,
        no_random_state,
        vast_random_state,
    ],
)
def test_a_state_that_no_run_comes_to_is_refused_and_changes_nothing(trainer, cut, change):
    forge(cut(), change)
    run = trainer(**SETTINGS)
    before = {name: parameter.clone() for name, parameter in run._parts.parameters.items()}
    with pytest.raises(InvalidArgumentError, match="Cannot read the checkpoint"):
        run.run(resume=True)
    assert all(torch.equal(before[name], each) for name, each in run._parts.parameters.items())
    assert not run._optimizer.state


def test_tensors_of_another_run_are_refused(trainer, cut, tmp_path):
    ours = cut()

    def stop(step):
        if step.step == 12:
            raise CutOffError

    with pytest.raises(CutOffError):
        trainer(folder="other", seed=1, **SETTINGS).run(progress=stop)
    (theirs,) = (tmp_path / "other").glob("checkpoint-*")
    (theirs / "training.safetensors").replace(ours / "training.safetensors")
    with pytest.raises(InvalidArgumentError, match="does not match the hash in"):
        trainer(**SETTINGS).run(resume=True)


@pytest.mark.parametrize("changes", [{"seconds": float("inf")}, {"tokens": -1}, {"step": True}, {"more": 1}])
def test_progress_that_no_run_makes_is_refused(trainer, cut, changes):
    facts = cut() / "training.json"
    said = json.loads(facts.read_text())
    said["progress"] |= changes
    facts.write_text(json.dumps(said))
    with pytest.raises(InvalidArgumentError, match="Cannot read the checkpoint"):
        trainer(**SETTINGS).run(resume=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("name", ["training.json", "training.safetensors", "../curve.jsonl"])
def test_a_special_file_blocks_nobody(trainer, cut, name):
    path = cut() / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InvalidArgumentError, match="is not a regular file"):
        trainer(**SETTINGS).run(resume=True)
