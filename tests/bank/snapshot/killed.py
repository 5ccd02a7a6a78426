"""A process that saves without end, killed at random moments, and what it left behind, looked at each time.

python tests/bank/snapshot/killed.py FOLDER BACKEND TIMES SEED
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from memlong import create_bank, load_bank
from memlong.bank import MemoryBank
from memlong.bank.snapshot.manifest import read_manifest
from memlong.testing.harness import DIM, random_chunks

STEP = 7  # chunks that each state adds
KEPT = 60
OPTIONS = {"torch": {}, "faiss": {"index": "HNSW16"}, "hnswlib": {"initial_capacity": 8}}


def step(bank: MemoryBank) -> None:
    """Go on to the next state, which the number of the next id alone decides."""
    random_chunks(STEP, seed=bank.next_id, first=bank.next_id).into(bank)


def expected(next_id: int) -> MemoryBank:
    """The bank at a state, made anew."""
    bank = create_bank("torch", DIM, max_chunks=KEPT)
    first = max(0, (next_id - KEPT) // STEP * STEP)
    bank.state.contents.fill(None, first)
    while bank.next_id < next_id:
        step(bank)
    return bank


def save_without_end(folder: Path, backend: str, pipe: int) -> None:
    bank = load_bank(folder, backend, trust_index=True)
    while True:
        step(bank)
        bank.save(folder)
        os.write(pipe, bank.next_id.to_bytes(8, "little"))


def trial(folder: Path, backend: str, rng: random.Random) -> dict[str, object]:
    before = load_bank(folder, "torch").next_id
    reader, pipe = os.pipe()
    child = os.fork()
    if not child:
        try:
            save_without_end(folder, backend, pipe)
        finally:
            os._exit(1)
    os.close(pipe)
    first = os.read(reader, 8)  # after the first save of a fresh process, which clears what the last one left
    time.sleep(rng.uniform(0, 0.08))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    told = first
    while more := os.read(reader, 8):
        told = more
    os.close(reader)
    left = {path.name for path in folder.iterdir()}
    bank = load_bank(folder, backend)
    wanted = expected(bank.next_id)
    ours, theirs = bank.fetch(bank.ids), wanted.fetch(wanted.ids)
    whole = bank.ids.tolist() == wanted.ids.tolist()
    whole = whole and torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    whole = whole and torch.equal(bank.embeddings.embeddings, wanted.embeddings.embeddings)
    named = {file.name for file in read_manifest(folder).files} | {"manifest.json"}
    bank.save(folder)
    after = {file.name for file in read_manifest(folder).files} | {"manifest.json"}
    last = int.from_bytes(told, "little")
    return {
        "killed": os.WIFSIGNALED(status),
        "went_on": last > before,
        "is_whole": whole,
        "is_old_or_new": bank.next_id in (last, last + STEP),
        "in_the_middle": left != named,
        "is_clean_after": {path.name for path in folder.iterdir()} == after,
    }


def main(folder: Path, backend: str, times: int, seed: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(seed)  # noqa: S311
    bank = create_bank(backend, DIM, max_chunks=KEPT, **OPTIONS[backend])
    for _ in range(20):
        step(bank)
    bank.save(folder)
    for _ in range(times):
        print(json.dumps(trial(folder, backend, rng)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
