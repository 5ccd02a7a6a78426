"""Several processes train as one with all their rows does, and end together."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch import nn

from memlong.decoder import Segment
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.training import TrainingConfig
from memlong.training.documents import Episode
from memlong.training.loss import Batch, SegmentLoss, segment_loss
from memlong.training.processes import Processes

SCRIPT = Path(__file__).with_name("together.py")


def imported():
    spec = spec_from_file_location("together", SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


together = imported()


def launch(*arguments):
    """Start the script in two processes on the CPU."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    typed = [*launcher, SCRIPT, *arguments]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(each) for each in typed], env=settings, capture_output=True, text=True, timeout=250
    )


def curve(folder):
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def assert_same_losses(found, expected):
    assert len(found) == len(expected) == together.TRAINING["steps"]
    for one, other in zip(found, expected, strict=True):
        for name in ("loss", "long_range_loss"):
            assert one[name] == (None if other[name] is None else pytest.approx(other[name], rel=1e-6))
        assert (one["step"], one["tokens"], one["lr"]) == (other["step"], other["tokens"], other["lr"])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of runs of two processes with two rows each."""
    folder = tmp_path_factory.mktemp("two")
    done = launch(folder, 2, *together.CASES)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", together.CASES)
def test_the_losses_are_those_of_one_process_with_all_rows(two, tmp_path, case):
    together.trainer(case, tmp_path / case, rows=4).run()
    assert_same_losses(curve(two / case), curve(tmp_path / case))
    names = {path.name for path in (two / case).iterdir()}
    assert names == {path.name for path in (tmp_path / case).iterdir()}
    assert json.loads((two / case / "memlong.json").read_text())["training"]["processes"] == 2


@pytest.mark.slow
def test_a_run_that_was_killed_resumes_to_the_same_losses(two, tmp_path):
    killed = launch(tmp_path, 2, "shared", "--kill", 9)
    assert killed.returncode != 0
    assert "Process 1 has lost the others" in killed.stderr
    copy = Path(shutil.copytree(tmp_path / "shared", tmp_path / "alone"))
    with pytest.raises(InvalidArgumentError, match=r"rows x processes must be 4, .* got 3"):
        together.trainer("shared", copy, rows=3).run(resume=True)
    together.trainer("shared", copy, rows=4).run(resume=True)
    assert_same_losses(curve(copy), curve(two / "shared"))
    resumed = launch(tmp_path, 2, "shared", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert [step["loss"] for step in curve(tmp_path / "shared")] == [
        step["loss"] for step in curve(two / "shared")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [(), ("--shard",)], ids=["whole", "divided"])
def test_processes_begin_with_the_lora_of_another_decoder(two, tmp_path, sharding):
    begun = two / "with-memory"
    done = launch(tmp_path, 2, "with-memory", "--lora", begun, *sharding)
    assert done.returncode == 0, done.stderr
    together.trainer("with-memory", tmp_path / "one", rows=4, lora=begun).run()
    assert_same_losses(curve(tmp_path / "with-memory"), curve(tmp_path / "one"))
    assert curve(tmp_path / "one")[-1]["loss"] != curve(begun)[-1]["loss"]


@pytest.mark.slow
def test_processes_that_differ_are_refused(tmp_path):
    done = launch(tmp_path, 2, "layer", "--other", 1)
    assert done.returncode != 0
    assert "seed must be 0, as in the main process, got 1 in process 1" in done.stderr
    assert not any(path.read_bytes() for path in (tmp_path / "layer").glob("curve*"))


class Two(Processes):
    """One of two processes, with what the other gives to each sum."""

    def __init__(self, *others):
        self.count, self.index, self.device = 2, 0, torch.device("cpu")
        self._others = list(others)

    def sum(self, tensor):
        return tensor.detach() + self._others.pop(0)


def test_gradients_are_summed_where_any_process_has_one():
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in [(2, 2), (3,), (1,), (2,)]]
    ours, theirs = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([5.0, 6.0, 7.0])
    parameters[0].grad = ours.clone()
    parameters[3].requires_grad_(False)
    other = torch.cat([torch.ones(4), theirs, torch.zeros(1), torch.tensor([1.0, 1.0, 0.0])])
    Two(other).sum_gradients(parameters)
    assert torch.equal(parameters[0].grad, ours + 1)
    assert torch.equal(parameters[1].grad, theirs)
    assert parameters[2].grad is None
    assert parameters[3].grad is None


def test_shares_of_the_objective_add_up_to_it(text):
    episodes = [text(length, seed=length)[0].fmod(11) for length in (8, 5, 2)]
    logits = torch.randn(3, 8, 11, generator=torch.Generator().manual_seed(0))

    def loss(rows):
        tokens = torch.arange(8).expand(len(rows), 8).clone()
        for place, row in enumerate(rows):
            tokens[place, len(episodes[row]) :] = -1
        chosen = logits[rows].requires_grad_()
        segment = Segment(torch.zeros_like(tokens), tokens, chosen, (None,) * len(rows))
        batch = Batch.of([Episode(episodes[row]) for row in rows], 2, torch.device("cpu"))
        return segment_loss(segment, batch, TrainingConfig(long_range_weight=2.0)), chosen

    whole, all_logits = loss([0, 1, 2])
    parts = [loss([0]), loss([1, 2])]
    weight = sum(part.weight for part, _ in parts) + SegmentLoss.zero(torch.device("cpu")).weight
    shares = [part.share_of(weight) for part, _ in parts]
    torch.testing.assert_close(sum(shares), whole.mean)
    (expected,) = torch.autograd.grad(whole.mean, all_logits)
    found = [torch.autograd.grad(share, own)[0] for share, (_, own) in zip(shares, parts, strict=True)]
    torch.testing.assert_close(torch.cat(found), expected)


def test_a_process_knows_the_numbers_of_the_others():
    assert Two(torch.tensor([[0, 0], [7, 8]])).all_of([5, 6]) == [5, 6, 7, 8]
    alone = Processes("cpu")
    assert (alone.count, alone.is_main, alone.all_of((3, 4)), alone.from_main("é")) == (1, True, [3, 4], "é")


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_model_shared_by_processes_is_refused(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(InvalidArgumentError, match=f"must be launched without --use_{name.lower()}"):
        Processes("cpu")


def test_processes_that_cannot_find_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidArgumentError, match=r"device must be .* to train in 2 processes, got 'mps'"):
        Processes("mps")


class State:
    """The fourth process on a machine, as accelerate tells it."""

    num_processes, process_index, local_process_index = 4, 3, 3
    device = torch.device("cuda", 3)

    def __init__(self, cpu):
        pass


@pytest.mark.parametrize(
    ("gpus", "device", "words"),
    [
        (2, "auto", "--num_processes must be at most 2, the number of GPUs"),
        (4, "cuda:0", "device must be 'cuda:3' in this process, number 3 on its machine, got 'cuda:0'"),
        (4, torch.device("cpu"), "device must be 'cuda:3' in this process"),
    ],
)
def test_each_process_needs_its_own_gpu(monkeypatch, gpus, device, words):
    monkeypatch.setattr("accelerate.PartialState", State)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(InvalidArgumentError, match=words):
        Processes(device)


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:3", torch.device("cuda", 3)])
def test_a_process_takes_its_own_gpu(monkeypatch, device):
    monkeypatch.setattr("accelerate.PartialState", State)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    processes = Processes(device)
    assert (processes.device, processes.index, processes.is_main) == (torch.device("cuda", 3), 3, False)


def test_a_process_that_is_left_alone_says_so(monkeypatch):
    def closed(_):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("torch.distributed.all_reduce", closed)
    process = Two()
    with pytest.raises(MemlongError, match="Process 0 has lost the others"):
        Processes.sum(process, torch.zeros(1))


def test_random_chunks_depend_on_the_episode_alone(trainer):
    one, other = trainer(random_share=0.5), trainer(folder="other", rows=3, random_share=0.5)

    def drawn(run):
        generators = [run._choice(number, 0).generator for number in range(40)]
        return [float(torch.rand(1, generator=each)) for each in generators]

    assert drawn(one) == drawn(other)
    assert len(set(drawn(one))) == 40
    with one.decoder as decoder:
        decoder.reset(choice=[one._choice(0, 0)])
        with pytest.raises(InvalidArgumentError, match=r"one element for each of the 2 rows, .* got 1"):
            decoder.read(torch.ones(2, 40, dtype=torch.int64))
