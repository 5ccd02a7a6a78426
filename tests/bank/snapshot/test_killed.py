"""kill -9 in the middle of a save leaves the old state or the new, and nothing after the next save."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TIMES = 200 if os.environ.get("MEMLONG_TORTURE") else 5


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.timeout(120 + 3 * TIMES)
@pytest.mark.parametrize("backend", ["torch", "faiss", "hnswlib"])
def test_a_killed_save_leaves_the_old_state_or_the_new(tmp_path, backend):
    command = [
        sys.executable,
        Path(__file__).with_name("killed.py"),
        tmp_path / "bank",
        backend,
        str(TIMES),
        "0",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    trials = [json.loads(line) for line in said.splitlines()]
    assert len(trials) == TIMES
    in_mid_save = sum(each["in_the_middle"] for each in trials)
    assert TIMES < 100 or 10 * in_mid_save > TIMES  # of a few kills, on a busy machine, none may come then
    for each in trials:
        in_the_middle = each.pop("in_the_middle")
        assert all(each.values()), (each, in_the_middle)
