"""``memlong train`` on a tiny random model, and what the other commands make of its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from memlong.cli.app import make_app
from memlong.errors import InvalidArgumentError, InvalidTextError, MemlongError
from memlong.training.folder import lock

QUICK = {
    "rows": 2,
    "steps": 4,
    "accumulate": 2,
    "document_tokens": 60,
    "lora_rank": 2,
    "lr": 0.05,
    "warmup_steps": 0,
    "sink_tokens": 2,
    "retrieval_layers": "2-3",
    "gate_init": -2,
}


@pytest.fixture
def run(invoke, story, tmp_path):
    return lambda **changes: invoke(
        "train", **{"text": story, "out": tmp_path / "trained", **QUICK, **changes}
    )


@pytest.fixture
def other(story):
    """Run another command with --adapter and these arguments."""

    def run(command, *arguments):
        given = {
            "perplexity": ["--text", story],
            "generate": ["--context", story, "--prompt", "word1"],
            "needle": ["--lengths", 100, "--depths", 0],
        }
        typed = [command, *map(str, given[command]), "--dtype", "float32", *arguments]
        return CliRunner().invoke(make_app(), typed)

    return run


@pytest.mark.slow
def test_what_it_leaves_serves_the_other_commands(run, other, tmp_path):
    result = run()
    assert result.exit_code == 0, result.output
    assert "4 steps, final loss" in result.stdout
    folder = tmp_path / "trained"
    assert {file.name for file in folder.iterdir()} >= {
        "adapter_model.safetensors",
        "gates.safetensors",
        "memlong.json",
        "curve.jsonl",
        "curve.png",
    }
    shown = other("perplexity", "--adapter", str(folder), "--json", "-")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["adapter"] == str(folder)
    assert (found["kv_source"], found["retriever"], found["local_window"]) == ("shared", "lm", 24)
    assert found["long_range_distance"] == 24
    by_chance = json.loads(
        other("perplexity", "--adapter", str(folder), "--retriever", "random", "--json", "-").stdout
    )
    assert by_chance["nll"] != found["nll"]
    assert by_chance["retriever"] == "random"
    alone = json.loads(
        other("perplexity", "--adapter", str(folder), "--backend", "none", "--json", "-").stdout
    )
    assert alone["chunks_stored"] == 0
    answer = other("generate", "--adapter", str(folder), "--max-new-tokens", "5", "--json", "-")
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["chunks_stored"] > 20
    said = other("needle", "--adapter", str(folder), "--json", "-")
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["adapter"] == str(folder)


def test_a_folder_and_maps(run, invoke, story, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.md"):
        (tmp_path / "texts" / name).write_text(story.read_text())
    maps = tmp_path / "maps.safetensors"
    fitted = CliRunner().invoke(
        make_app(),
        [
            *[
                "fit",
                "--model",
                str(tmp_path / "model"),
                "--text",
                str(story),
                "--out",
                str(maps),
                "--dim",
                "16",
            ],
            *["--passage-tokens", "40", "--retrieval-layers", "2-3", "--dtype", "float32"],
        ],
    )
    assert fitted.exit_code == 0, fitted.output
    result = run(text=tmp_path / "texts", kv_source="latent", maps=maps, lora_rank=0)
    assert result.exit_code == 0, result.output
    assert "2 documents" in result.stdout
    names = {file.name for file in (tmp_path / "trained").iterdir()}
    assert "maps.safetensors" in names
    assert "adapter_model.safetensors" not in names


def test_what_was_trained_cannot_be_set_otherwise(run, other, tmp_path):
    result = other("perplexity", "--adapter", str(tmp_path), "--chunk-size", "3")
    assert isinstance(result.exception, InvalidArgumentError), result.output
    assert "--chunk-size cannot be combined with --adapter" in str(result.exception)
    result = other("generate")
    assert "--model is missing" in str(result.exception)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text": []}, InvalidArgumentError, "nothing to train on"),
        ({"text": "no-such.txt"}, InvalidTextError, "'no-such.txt' does not exist"),
        ({"resume": True}, InvalidArgumentError, "has no checkpoint to resume from"),
        ({"steps": 0}, InvalidArgumentError, "steps must be"),
        ({"backend": "none"}, InvalidArgumentError, "--backend must name a backend"),
        ({"kv_source": "latent"}, InvalidArgumentError, "maps must name the file"),
        (
            {"memory_layer": 3, "retrieval_layers": "3", "lora_target": "query"},
            InvalidArgumentError,
            "must name linear layers from layer 3 up",
        ),
        ({"memory_layer": 3}, InvalidArgumentError, "retrieval_layers must be 3 or above"),
        ({"out": "/dev/null/folder"}, MemlongError, "Cannot create the folder"),
    ],
)
def test_bad_input_is_named_with_what_to_do(run, changes, error, message):
    result = run(**changes)
    assert isinstance(result.exception, error), result.output
    with pytest.raises(MemlongError, match=message):
        raise result.exception


def test_shared_memory_is_read_by_every_fourth_layer(run, tmp_path):
    arguments = {"retrieval_layers": [], "memory_layer": 0, "steps": 1}
    result = run(**arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "trained" / "memlong.json").read_text())
    assert facts["memory"]["retrieval_layers"] == "0"


def test_a_run_begins_with_the_lora_of_another(run, tmp_path):
    assert run(steps=1).exit_code == 0
    result = run(out=tmp_path / "second", lora=tmp_path / "trained", steps=1)
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "second" / "memlong.json").read_text())
    assert facts["training"]["lora"]
    result = run(out=tmp_path / "third", lora=tmp_path / "nowhere", text="no-such.txt")
    assert "nowhere" in str(result.exception)  # before anything is read


def test_tensorboard_needs_its_package(run, monkeypatch):
    monkeypatch.setattr("memlong.training.curve.find_spec", lambda name: None)
    assert "pip install tensorboard" in str(run(tensorboard="events").exception)


def test_resuming_what_has_ended_says_so(run):
    assert run().exit_code == 0
    result = run(resume=True)
    assert result.exit_code == 0, result.output
    assert "training is already complete" in result.stdout


@pytest.mark.parametrize("resume", [True, []])
def test_a_second_run_in_a_folder_is_refused_before_any_work(run, tmp_path, monkeypatch, resume):
    monkeypatch.setattr("memlong.decoder.load_model", lambda *_, **__: pytest.fail("it works already"))
    (tmp_path / "trained" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "trained" / "checkpoint-3" / "training.json").write_text("{}")
    with lock(tmp_path / "trained"):
        assert "is held by" in str(run(resume=resume).exception)
    (tmp_path / "trained" / "checkpoint-4").symlink_to(tmp_path)
    assert "checkpoint-4' is a link" in str(run(resume=resume).exception)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_print_and_write_once(arguments, story, tmp_path, shard):
    options = {"shard": True} if shard else {}
    typed = arguments("train", text=story, out=tmp_path / "trained", **QUICK, **options)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "memlong", *typed]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes, cpu, float32") == 1
    assert done.stdout.count("4 steps, final loss") == 1
    assert done.stderr.count("loading the model") == 1
    assert len((tmp_path / "trained" / "curve.jsonl").read_text().splitlines()) == 4
    assert not (tmp_path / "trained" / "training.lock").exists()
