"""kill -9 of a command leaves the corpus or the session as it was or as it was to be, and the next run completes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TIMES = 100 if os.environ.get("MEMLONG_TORTURE") else 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL"),
    pytest.mark.timeout(300 + 20 * TIMES),
]


@pytest.fixture
def trials(arguments, tmp_path):
    def run(kind, times=TIMES):
        command = [sys.executable, Path(__file__).with_name("killed.py"), kind, tmp_path, str(times), "0"]
        done = subprocess.run(
            command, input=json.dumps(arguments(kind)[1:]), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(found) == times
        return found

    return run


@pytest.mark.parametrize("kind", ["remember", "chat"])
def test_what_a_kill_leaves_is_whole_and_the_next_run_completes_it(trials, kind):
    found = trials(kind)
    assert TIMES < 100 or sum(each["in_the_middle"] for each in found) > TIMES // 20
    assert any(each["was_killed"] for each in found)
    for each in found:
        assert all(value for name, value in each.items() if name.startswith("is_")), each


def test_who_asks_while_a_document_leaves_sees_the_corpus_before_or_after(trials):
    for each in trials("ask", max(1, TIMES // 4)):
        assert all(each.values()), each
