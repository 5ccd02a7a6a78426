"""The bench prints what it measured, and the ratios are those of its times."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench.py"


@pytest.mark.slow
def test_the_bench_compares_a_bank_with_pymilvus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("bench_of_milvus", BENCH)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    given = ["--uri", tmp_path / "a.db", "--folder", tmp_path, "--json", tmp_path / "out.json"]
    small = ["--chunks", 300, "--block-kib", 1, "--queries", 5, "--crowd", 2]
    bench.main([str(word) for word in (*given, *small)])
    result = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert result["recall_at_8"] == 1
    for part in (result, result["crowd"]):
        times, ratios = part["times"], part["ratios"]
        assert ratios["search"]["p50"] == (
            times["bank.search"]["p50_ms"] / times["pymilvus search"]["p50_ms"]
        )
        assert ratios["retrieve"]["p99"] == (
            times["bank.retrieve"]["p99_ms"] / times["pymilvus search + reads"]["p99_ms"]
        )
