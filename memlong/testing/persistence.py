"""The contract of snapshots: a saved bank can be loaded in any process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from memlong.bank import MemoryBank
from memlong.errors import SnapshotError
from memlong.testing.harness import BankSuite, assert_same_state, random_chunks, random_vectors, state_of

_GO_ON = """
import importlib, json, sys
from memlong.bank import bank_of
from memlong.testing.persistence import what_follows
module, _, name = sys.argv[2].partition(":")
bank_class = bank_of(getattr(importlib.import_module(module), name))
open(sys.argv[3], "w").write(json.dumps(what_follows(bank_class.load(sys.argv[1], trust_index=True))))
"""


class PersistenceTests(BankSuite):
    """Saving and loading banks."""

    fresh_process: ClassVar[bool] = True

    def _worn(self, **options: Any) -> MemoryBank:
        """Return a bank with some chunks removed and others retrieved."""
        bank, chunks = self.filled(300, **options)
        bank.remove(bank.ids[[5, 80, 299]])
        bank.retrieve(chunks.embeddings[:7], 2)
        return bank

    def test_everything_in_a_bank_is_restored(self, tmp_path: Path) -> None:
        """Ids, embeddings, spans, usage, keys and values; also the next id, even if the newest chunk was removed."""
        bank = self._worn(max_chunks=500, eviction="lru")
        bank.save(tmp_path)
        loaded = self.bank_class.load(tmp_path)
        assert torch.equal(loaded.ids, bank.ids)
        assert torch.equal(loaded.embeddings.embeddings, bank.embeddings.embeddings)
        assert loaded.usage.retrievals.tolist() == bank.usage.retrievals.tolist()
        assert loaded.usage.last_used.tolist() == bank.usage.last_used.tolist()
        ours, theirs = bank.fetch(bank.ids), loaded.fetch(bank.ids)
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert torch.equal(ours.spans, theirs.spans)
        assert random_chunks(1, seed=1).into(loaded).tolist() == [300]

    def test_a_loaded_bank_finds_its_chunks(self, tmp_path: Path) -> None:
        """A search for all chunks finds them all; an exact bank's searches return the same as before."""
        bank = self._worn()
        bank.save(tmp_path)
        loaded = self.bank_class.load(tmp_path)
        found = loaded.search(random_vectors(2, seed=3), 300)
        assert all(set(row) - {-1} == set(bank.ids.tolist()) for row in found.ids.tolist())
        if self.exact:
            assert_same_state(state_of(bank), loaded)

    def test_a_trusted_index_finds_the_same(self, tmp_path: Path) -> None:
        """If the backend saves its index, results are the same after loading it."""
        bank = self._worn()
        if bank.index.dump() is None:
            pytest.skip("this backend does not save its index")
        bank.save(tmp_path)
        assert_same_state(state_of(bank), self.bank_class.load(tmp_path, trust_index=True))

    def test_saving_again_keeps_what_is_there(self, tmp_path: Path) -> None:
        """After an `add`, keys and values already saved are not rewritten."""
        bank, _ = self.filled(100)
        bank.save(tmp_path)
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("blocks-*")}
        random_chunks(3, seed=1, first=100).into(bank)
        bank.save(tmp_path)
        after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("blocks-*")}
        assert before.items() < after.items()
        assert self.bank_class.load(tmp_path).ids.tolist() == list(range(103))

    def test_damaged_files_are_rejected(self, tmp_path: Path) -> None:
        """A changed byte in any file is an error that names the file."""
        bank, _ = self.filled(300)
        bank.save(tmp_path)
        for path in sorted(tmp_path.iterdir()):
            content = path.read_bytes()
            damaged = bytearray(content)
            damaged[len(content) // 2] ^= 8
            path.write_bytes(damaged)
            with pytest.raises(SnapshotError, match=path.name):
                self.bank_class.load(tmp_path, trust_index=True)
            path.write_bytes(content)
        assert len(self.bank_class.load(tmp_path)) == 300

    @pytest.mark.slow
    def test_a_fresh_process_continues(self, tmp_path: Path) -> None:
        """Another process loads the bank, adds to it, and finds what this one does."""
        if not self.fresh_process:
            pytest.skip("fresh_process is False")
        bank = self._worn()
        bank.save(tmp_path)
        finds_the_same = self.exact or bank.index.dump() is not None
        where = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-c", _GO_ON, str(tmp_path), f"{self.bank_class.maker.__module__}:"]
        command[-1] += self.bank_class.maker.__qualname__
        report = tmp_path.with_suffix(".json")  # not stdout, where libraries may print
        subprocess.run(  # noqa: S603 - this very interpreter
            [*command, str(report)], check=True, env={**os.environ, "PYTHONPATH": where}
        )
        theirs, ours = json.loads(report.read_text()), what_follows(bank)
        assert theirs["held"] == ours["held"]
        assert theirs["numbers"] == ours["numbers"]
        assert theirs["found"] == ours["found"] or not finds_the_same


def what_follows(bank: MemoryBank) -> dict[str, Any]:
    """Search and add to a bank, and return the observable results."""
    found = bank.search(random_vectors(4, seed=77), 6)
    random_chunks(5, seed=8, first=300).into(bank)
    return {
        "found": [found.ids.tolist(), found.scores.tolist()],
        "held": bank.ids.tolist(),
        "numbers": bank.fetch(bank.ids).keys.flatten(1)[:, 0].tolist(),
    }
