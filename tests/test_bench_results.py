"""What a bench has measured is in its file at once, and what it had no time for is named."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel
from typer.testing import CliRunner

BENCH = Path(__file__).parent.parent / "bench"


def script(name: str) -> ModuleType:
    sys.path[:] = dict.fromkeys([*sys.path, str(BENCH)])  # where Python would look, too
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def measured(name: str, path: Path, *typed: object):
    """Run a bench, and return what it says and its result file."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(script(name).main)
    result = CliRunner().invoke(app, [*map(str, typed), "--json", str(path)])
    assert result.exit_code == 0, result.output
    return result.stdout, json.loads(path.read_text(encoding="utf-8"))


def test_a_report_can_be_read_after_each_measurement(tmp_path):
    results = script("results")
    path = tmp_path / "out" / "report.json"
    report = results.Report(path, {"model": "tiny"})

    def told():
        return json.loads(path.read_text(encoding="utf-8"))

    assert (told()["model"], told()["complete"], told()["ratios"]) == ("tiny", False, [])
    report.add({"rows": [1]}, [results.Ratio("a", 1.0)])
    assert (told()["rows"], told()["complete"], len(told()["ratios"])) == ([1], False, 1)
    report.end()
    assert told()["complete"]
    report.leave_out("b")
    report.end()
    assert (told()["left_out"], told()["complete"]) == (["b: out of time"], False)


def test_what_cannot_be_written_leaves_the_report_before_it(tmp_path):
    path = tmp_path / "report.json"
    report = script("results").Report(path, {"rows": 1})
    with pytest.raises(TypeError):
        report.add({"rows": object()})
    assert json.loads(path.read_text(encoding="utf-8"))["rows"] == 1


def test_a_budget_is_shared_among_what_is_left():
    results = script("results")
    assert not results.Budget().share(4).is_spent
    assert 20 < results.Budget(100).share(4).left <= 25
    assert results.Budget(0).is_spent


def test_kernels_are_named_and_their_gradients_looked_at(tmp_path):
    _, found = measured("attention_kernels", tmp_path / "kernels.json", "--small", "--dtype", "float32")
    assert {row["mask"] for row in found["rows"]} == {"additive", "lower right"}
    assert all(row["taken"] == "flash" and row["error"] < 1e-5 for row in found["rows"])
    assert {each["found"] for each in found["gradients"]} == {"all finite", "learns"}
    assert found["complete"]


@pytest.mark.parametrize(("kernel", "taken"), [("CUDNN_ATTENTION", "none: "), ("MATH", "math")])
def test_a_kernel_that_does_not_take_a_shape_is_named_so(kernel, taken):
    bench = script("attention_kernels")

    def within():
        return sdpa_kernel(getattr(SDPBackend, kernel))

    row = bench._measured(bench.TINY[0], "float32", "additive", "it alone", within, "cpu")
    assert row.taken.startswith(taken)
    assert (row.warm_ms is None) == (taken != "math")


def test_benches_that_are_out_of_time_keep_what_they_have(tmp_path):
    typed = ["--model", "random-tiny", "--seconds", 0]
    backend = ["--backend", "torch", "--tokens", 512]
    said, found = measured("decoder", tmp_path / "decoder.json", *typed, *backend)
    assert found["streaming"]["torch"] > 0
    assert [each.partition(":")[0] for each in found["left_out"]] == [
        "streaming beyond 1 of 2 segments",
        "parts",
        "decoding",
        "training",
    ]
    assert "Skipped decoding: out of time" in said
    sizes = ["--sizes", "100,200", "--dims", 8, "--backend", "torch"]
    _, found = measured("bank", tmp_path / "bank.json", *sizes, "--seconds", 0)
    assert [row["chunks"] for row in found["rows"]] == [100]
    assert (found["left_out"], found["complete"]) == (["torch, 200 x 8: out of time"], False)


@pytest.mark.slow
def test_training_is_timed_by_rows_and_form(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    typed = ["--model", "random-tiny", "--steps", 1, "--most-rows", 4]
    _, found = measured("training", tmp_path / "training.json", *typed, "--seconds", 0)
    (row,) = found["rows"]
    assert (row["setting"], row["steps"]) == ("shared, 4 x 256", 1)
    assert row["tokens_per_second"] > 0
    assert len(found["left_out"]) == 3
