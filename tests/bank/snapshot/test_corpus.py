"""Thousands of corrupted snapshots: each is refused by name; none crashes, hangs, or loads wrong data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

CASES = 10_000 if os.environ.get("MEMLONG_TORTURE") else 300
AT_A_TIME = 500
SECONDS_A_CASE = 0.5


@pytest.mark.slow
@pytest.mark.timeout(60 + CASES * SECONDS_A_CASE)
def test_every_corrupted_snapshot_is_refused_by_name(tmp_path):
    outcomes: Counter[str] = Counter()
    odd = []
    for first in range(0, CASES, AT_A_TIME):
        count = min(AT_A_TIME, CASES - first)
        command = [sys.executable, Path(__file__).with_name("corpus.py"), tmp_path, str(first), str(count)]
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=60 + count * SECONDS_A_CASE, check=False
        )
        lines = [json.loads(line) for line in process.stdout.splitlines()]
        assert process.returncode == 0, (
            lines[-1:],
            process.stderr[-2000:],
        )  # the last one began, and crashed
        ended = [line for line in lines if line["outcome"] != "began"]
        assert [line["case"] for line in ended] == list(range(first, first + count))
        outcomes.update(line["outcome"] for line in ended)
        for line in ended:
            is_harmless = line["damage"] in ("forge_the_index", "forge_options") and line["outcome"] == "same"
            if line["outcome"] != "refused" and not is_harmless:
                odd.append(line)
    assert not odd
    assert outcomes["refused"] > 0.9 * CASES
