"""Frozen weights that processes divide: the same losses, with a share of the weights in each."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn

from memlong.errors import InvalidArgumentError, MemlongError, UnsupportedModelError
from memlong.training.processes import Processes
from memlong.training.shards import Shards, _layers, _shared
from tests.training.test_processes import Two, assert_same_losses, curve, launch, together
from tests.training.test_recall import mixed_trainer

CASES = (*together.CASES, *together.TRIED)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of runs of two processes that each hold the whole model."""
    folder = tmp_path_factory.mktemp("whole")
    done = launch(folder, 2, *CASES)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """The folder of the same runs with a share of the model in each process."""
    folder = tmp_path_factory.mktemp("divided")
    done = launch(folder, 2, *CASES, "--shard")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_losses_and_the_decoder_are_those_without_it(whole, divided, case):
    assert_same_losses(curve(divided / case), curve(whole / case))
    names = {path.name for path in (whole / case).iterdir()}
    assert {path.name for path in (divided / case).iterdir()} == names
    for name in names:
        if name.endswith(".safetensors"):
            found, expected = (load_file(folder / case / name) for folder in (divided, whole))
            for each, tensor in expected.items():
                torch.testing.assert_close(found[each], tensor, rtol=1e-5, atol=1e-6)
    found, expected = (
        json.loads((folder / case / "memlong.json").read_text()) for folder in (divided, whole)
    )
    assert (found["training"].pop("shard"), expected["training"].pop("shard")) == (True, False)
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_each_process_holds_its_share(divided, tmp_path, case):
    run = together.trainer(case, tmp_path / case, rows=4)
    everything = sum(map(together.bytes_held, run.decoder.model.parameters()))
    shared = sum(each.nbytes for each in _shared(run.decoder.model, layers_of(run)))
    held = [int((divided / f"{case}.{process}.bytes").read_text()) for process in range(2)]
    assert sum(held) == everything + shared
    assert max(held) - shared <= 0.51 * (everything - shared)


@pytest.mark.slow
def test_a_run_that_was_killed_resumes_with_it_or_without(divided, tmp_path):
    killed = launch(tmp_path, 2, "shared", "--shard", "--kill", 9)
    assert killed.returncode != 0
    assert "Process 1 has lost the others" in killed.stderr
    together.trainer("shared", tmp_path / "shared", rows=4).run(resume=True)
    assert_same_losses(curve(tmp_path / "shared"), curve(divided / "shared"))
    killed = launch(tmp_path / "again", 2, "shared", "--kill", 9)
    assert killed.returncode != 0
    resumed = launch(tmp_path / "again", 2, "shared", "--resume", "--shard")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_losses(curve(tmp_path / "again" / "shared"), curve(divided / "shared"))


def layers_of(run):
    return _layers(run.decoder.model, run.decoder.model_layout.modules)


class One(Processes):
    """The only process of a group."""

    def __init__(self):
        self.count, self.index, self.device = 1, 0, torch.device("cpu")


@pytest.fixture
def shards():
    """Divides a trainer's model among the processes of a group of one."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)

    def divide(run):
        run._shards = Shards(run.decoder, run._parts.parameters.values(), One())
        return run._shards

    yield divide
    distributed.destroy_process_group()


def test_a_divided_model_learns_the_same(trainer, shards):
    memory = {"kv_source": "latent", "gate_init": 0.0}
    options = {"contrast": 2.0, "distill": 0.3, "gradient_checkpointing": True}
    whole, divided = trainer(memory, **options), trainer(memory, folder="other", **options)
    shards(divided)
    assert [step.loss for step in divided.run()] == pytest.approx(
        [step.loss for step in whole.run()], rel=1e-6
    )
    for name, parameter in whole._parts.parameters.items():
        torch.testing.assert_close(divided._parts.parameters[name], parameter)


def test_a_divided_model_answers_in_forks(tiny_model, small, shards, tmp_path):
    memory = {"retrieve_for": "answers", "adapter_for": "memory"}
    options = {"mix": {"needles": 1}, "memory": memory, "contrast": 2.0, "only_found": True, "steps": 4}
    whole, divided = (mixed_trainer(tiny_model("Llama"), small, tmp_path / each, **options) for each in "ab")
    shards(divided)
    assert [step.loss for step in divided.run()] == pytest.approx(
        [step.loss for step in whole.run()], rel=1e-6
    )


def test_a_divided_model_does_not_say_what_its_weights_are(trainer, shards):
    run = trainer()
    shards(run)
    with pytest.raises(
        UnsupportedModelError, match=r"divided among processes.*Load the trained decoder from its"
    ):
        run.decoder.fingerprint()


@pytest.mark.parametrize("memory", [{"kv_source": "shared"}, {"kv_source": "latent", "gate_init": 0.0}])
def test_gradients_of_nothing_pass_the_layers_that_others_pass(trainer, shards, memory):
    run = trainer(memory, lora_rank=0 if memory["kv_source"] == "latent" else 4)
    divided = shards(run)
    passed = []
    for number, layer in enumerate(layers_of(run)):
        layer.register_full_backward_hook(lambda *_, number=number: passed.append(number))
    nothing = divided.idle(2, gradients=True)
    assert nothing.item() == 0
    nothing.backward()
    assert passed == [3, 2, 3, 2]
    assert all(not each.grad.any() for each in run._parts.parameters.values() if each.grad is not None)
    assert not divided.idle(1, gradients=False).requires_grad


def test_a_process_knows_how_often_others_run_the_model(trainer, shards):
    divided = shards(trainer())
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert [divided.calls_for(each) for each in (mask, mask[2:], mask[:, :0])] == [1, 0, 0]
    divided._goes_by_length = True
    assert divided.calls_for(mask) == 2
    assert Two(torch.tensor([[0, 0], [1, 3]])).most_of([2, 1]) == [2, 3]


def test_a_single_process_holds_the_whole_model(trainer):
    one, other = trainer(), trainer(folder="other", shard=True)
    assert other._shards is None
    assert [step.loss for step in one.run()] == [step.loss for step in other.run()]


def test_a_quantized_model_is_not_divided(trainer, shards):
    run = trainer()
    run.decoder.model.hf_quantizer = object()
    with pytest.raises(InvalidArgumentError, match="shard must be False for quantized weights"):
        shards(run)


def test_an_offloaded_model_is_not_divided(trainer, shards):
    run = trainer()
    run.decoder.model.lm_head.to("meta")
    with pytest.raises(InvalidArgumentError, match=r"decoder.model must be on one device .* on cpu and meta"):
        shards(run)


def test_layers_in_no_list_are_not_divided():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(
        InvalidArgumentError, match="shard must be False for a Sequential, whose layers are in no list"
    ):
        _layers(model, [model[0]])


def test_weights_of_several_layers_stay_whole():
    block, other = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(block, other), nn.Sequential(block)])})
    model["head"] = nn.Linear(2, 2, bias=False)
    model["head"].weight = other.weight
    layers = _layers(model, [block])
    assert layers == list(model["layers"])
    assert _shared(model, layers) == {block.weight, block.bias, other.weight}


def test_only_lost_connections_are_told_as_such():
    process = One()
    with pytest.raises(MemlongError, match="Process 0 has lost the others"), process.exchanging():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(RuntimeError, match="size mismatch"), process.exchanging():
        raise RuntimeError("size mismatch")
