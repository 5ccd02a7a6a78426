"""Thousands of snapshots and adapters of another structure than was written: each is refused, or what it says it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

for needed in ("peft", "faiss", "hnswlib", "usearch"):
    pytest.importorskip(needed)

CASES = 10_000 if os.environ.get("MEMLONG_TORTURE") else 220
AT_A_TIME = 2500
SECONDS_A_CASE = 0.5


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures memory as Linux does")
@pytest.mark.timeout(120 + CASES * SECONDS_A_CASE)
def test_whatever_the_files_say_is_refused_or_right_within_bounds(tmp_path):
    outcomes: Counter[str] = Counter()
    odd = []
    for first in range(0, CASES, AT_A_TIME):
        count = min(AT_A_TIME, CASES - first)
        process = subprocess.run(
            [sys.executable, Path(__file__).with_name("mutated.py"), tmp_path, str(first), str(count)],
            capture_output=True,
            text=True,
            timeout=120 + count * SECONDS_A_CASE,
            check=False,
        )
        lines = [json.loads(line) for line in process.stdout.splitlines()]
        assert process.returncode == 0, (lines[-1:], process.stderr[-3000:])  # crashed, or took too long
        ended = [line for line in lines if line["outcome"] != "began"]
        assert [line["case"] for line in ended] == list(range(first, first + count))
        outcomes.update(line["outcome"] for line in ended)
        odd += [line for line in ended if line["outcome"] not in ("refused", "same", "other")]
        odd += [line for line in ended if line["megabytes"] > 1000]
    assert not odd
    assert outcomes["refused"] > 0.7 * CASES
