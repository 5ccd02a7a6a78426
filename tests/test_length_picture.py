"""bench/length_picture.py: what it reads from results, and draws."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest

from memlong.errors import InvalidArgumentError

LOSSES = {"window 1024": 3.0, "lm 32": 1.0, "lm 8": 2.5}


@pytest.fixture
def picture(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    return importlib.import_module("length_picture")


@pytest.fixture
def results(tmp_path):
    paths = []
    for tokens in (100, 300):
        parts = {
            name: {part: {"perplexity": math.exp(loss)} for part in ("all", "long_range")}
            for name, loss in LOSSES.items()
        }
        found = {"score_from": 50, "texts": {"a": {"tokens": tokens, "systems": parts}}, "systems": LOSSES}
        paths.append(tmp_path / f"{tokens}.json")
        paths[-1].write_text(json.dumps(found), encoding="utf-8")
    return paths


def test_gaps_are_those_to_a_memory_of_32_chunks(picture, results, tmp_path):
    found = [json.loads(path.read_text(encoding="utf-8")) for path in results]
    lengths, closed = picture.gaps(found, "a", "lm 8", "all")
    assert lengths == [150, 350]
    assert closed == pytest.approx([25, 25])
    picture.main(results, tmp_path / "new" / "lengths.png")
    assert (tmp_path / "new" / "lengths.png").stat().st_size > 1000


def test_results_without_common_systems_are_refused(picture, results):
    found = json.loads(results[0].read_text(encoding="utf-8"))
    del found["texts"]["a"]["systems"]["lm 8"]
    results[0].write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(
        InvalidArgumentError, match="must share texts, and systems with 'window 1024' and 'lm 32'"
    ):
        picture.main(results)
    with pytest.raises(InvalidArgumentError, match=r"'nowhere.json' must be a result of bench/front.py"):
        picture.main([Path("nowhere.json")])
