"""A forked process has a copy of a bank whose rows and objects are its parent's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

_FORKS = """
import os, pathlib, signal, sys
from memlong.errors import MemlongError
from memlong.testing.harness import random_chunks
from memlong_milvus.bank import MilvusBank
bank = MilvusBank(32)
more = random_chunks(5, seed=1, first=500)
random_chunks(5).into(bank)
objects = pathlib.Path(bank.state.store.folder.place)
child = os.fork()
if not child:
    signal.alarm(30)
    for change in (lambda: more.into(bank), lambda: bank.remove([0]), bank.reset, lambda: bank.evict(2)):
        try:
            change()
        except MemlongError as error:
            assert "from which this one was forked" in str(error), error
        else:
            raise AssertionError(change)
    del bank
    sys.exit(0)  # with all that is registered for a process's end
assert os.waitpid(child, 0)[1] == 0
assert len(list(objects.rglob("*.kv"))) == 5
random_chunks(5, seed=2, first=40).into(bank)
assert bank.fetch(bank.ids).keys.shape[0] == 10
assert bank.search(more.embeddings, 10).ids.sort().values[0].tolist() == list(range(10))
bank.close()
"""


@pytest.mark.slow
def test_a_child_takes_nothing_from_its_parent(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FORKS], cwd=tmp_path, timeout=200, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
