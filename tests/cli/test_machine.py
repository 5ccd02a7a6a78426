"""What commands say of the device and the dtype that they ran on."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from memlong.cli.app import make_app
from memlong.decoder.model import machine

TRAINING: dict[str, Any] = {
    "rows": 2,
    "steps": 2,
    "accumulate": 2,
    "document_tokens": 60,
    "lora_rank": 2,
    "warmup_steps": 0,
    "sink_tokens": 2,
    "retrieval_layers": "2-3",
}


@pytest.fixture
def cpu(monkeypatch):
    """A machine without a GPU, whose CPU multiplies so many times as fast in bfloat16."""

    def pretend(speedup: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(machine, "bfloat16_speedup", lambda: speedup)

    return pretend


@pytest.mark.parametrize(("speedup", "dtype"), [(2.0, "bfloat16"), (0.2, "float32")])
@pytest.mark.parametrize(
    ("command", "changes"),
    [
        ("perplexity", {}),
        ("generate", {"prompt": "word1 word2", "max_new_tokens": 2}),
        ("needle", {"lengths": 60, "depths": 0.5}),
    ],
)
def test_reports_and_bars_name_what_was_chosen(
    cpu, invoke, story, tmp_path, command, changes, speedup, dtype
):
    cpu(speedup)
    texts = {"perplexity": {"text": story}, "generate": {"context": story}, "needle": {"filler": story}}
    file = tmp_path / "result.json"
    result = invoke(command, dtype="auto", sink_tokens=2, json=file, **texts[command], **changes)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (found["device"], found["dtype"]) == ("cpu", dtype)
    assert f"{dtype} on cpu (this CPU multiplies" in result.stderr
    assert f"(cpu, {dtype}):" in result.stderr  # the bar
    if command != "generate":
        assert f"cpu, {dtype}" in result.stdout


def test_without_options_everything_is_auto(cpu, model_folder, story):
    cpu(0.2)
    given = ["perplexity", "--model", str(model_folder), "--text", str(story), "--json", "-"]
    sizes = ["--segment-size", "8", "--chunk-size", "4", "--local-window", "24"]
    result = CliRunner().invoke(make_app(), [*given, *sizes])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["dtype"] == "float32"


@pytest.mark.slow
def test_a_trained_decoder_brings_its_dtype_and_the_command_says_so(cpu, invoke, story, tmp_path):
    cpu(2.0)
    folder = tmp_path / "trained"
    made = invoke("train", text=story, out=folder, **{**TRAINING, "dtype": "float32"})
    assert made.exit_code == 0, made.output
    assert "trainable parameters, cpu, float32" in made.stdout
    used = ["perplexity", "--adapter", str(folder), "--text", str(story), "--json", "-"]
    result = CliRunner().invoke(make_app(), used)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["dtype"] == "float32"
    assert f"as {folder} was trained, but this CPU multiplies 2.0 times" in result.stderr
    assert "try --dtype bfloat16" in result.stderr
    other = CliRunner().invoke(make_app(), [*used, "--dtype", "bfloat16"])
    assert json.loads(other.stdout)["dtype"] == "bfloat16"


def test_a_run_is_resumed_in_its_own_dtype(cpu, invoke, story, tmp_path, monkeypatch):
    cpu(0.2)
    folder = tmp_path / "trained"
    settings = {"text": story, "out": folder, **TRAINING, "dtype": "auto"} | {
        "checkpoint_every": 1,
        "steps": 8,
    }
    with monkeypatch.context() as patch:
        patch.setattr("memlong.training.parts.TrainableParts.freeze", lambda _: 1 / 0)  # before the end
        assert invoke("train", **settings).exit_code != 0
    cpu(2.0)  # another machine
    result = invoke("train", resume=True, **settings)
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "memlong.json").read_text())["dtype"] == "float32"
    assert f"as {folder} was trained" in result.stderr
