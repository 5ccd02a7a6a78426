"""Sixteen threads at one bank: nothing fails, nothing is lost, and every result is that of some moment."""

from __future__ import annotations

import itertools
import os
import threading
import time

import pytest
import torch

from memlong import create_bank, load_bank

SECONDS = 60 if os.environ.get("MEMLONG_TORTURE") else 2
DIM, SHAPE, MOST = 16, (1, 1, 2, 4), 120
BACKENDS = {
    "torch": ("torch", {}),
    "faiss": ("faiss", {}),
    "faiss-hnsw": ("faiss", {"index": "HNSW16"}),
    "hnswlib": ("hnswlib", {"initial_capacity": 8}),
}


class Crowd:
    """Four that add, one that evicts, one that saves, ten that search; each notes its errors."""

    def __init__(self, bank, folder) -> None:
        self.bank, self.folder = bank, folder
        self.numbers = itertools.count()
        self.of_id: dict[int, int] = {}
        self.calls, self.errors = {"add": 0, "evict": 0, "save": 0, "search": 0}, []
        self.lock, self.end = threading.Lock(), time.monotonic() + SECONDS

    def run(self) -> None:
        kinds = [self.add] * 4 + [self.evict, self.save] + [self.search] * 10
        threads = [threading.Thread(target=self.work, args=(kind, n)) for n, kind in enumerate(kinds)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def work(self, kind, number) -> None:
        generator = torch.Generator().manual_seed(number)
        try:
            while time.monotonic() < self.end and not self.errors:
                kind(generator)
                self.calls[kind.__name__] += 1
        except BaseException as error:  # noqa: BLE001
            self.errors.append(error)

    def add(self, generator) -> None:
        with self.lock:
            numbers = [next(self.numbers) for _ in range(3)]
        keys = torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1, 1, 1).expand(-1, *SHAPE)
        ids = self.bank.add(
            torch.randn(3, DIM, generator=generator), keys, -keys, [(n, n + 1) for n in numbers]
        ).tolist()
        with self.lock:
            assert not self.of_id.keys() & set(ids)
            self.of_id |= zip(ids, numbers, strict=True)

    def evict(self, generator) -> None:
        self.bank.evict(2)
        time.sleep(0.002)

    def save(self, generator) -> None:
        self.bank.save(self.folder)
        saved = load_bank(self.folder, "torch")
        ids = saved.ids.tolist()
        assert ids == list(range(saved.next_id - len(ids), saved.next_id))

    def search(self, generator) -> None:
        got = self.bank.retrieve(torch.randn(1, DIM, generator=generator), MOST)
        ids = [each for each in got.ids[0].tolist() if each >= 0]
        # Whoever leaves, the oldest go first: what one moment held is a run of ids.
        assert not ids or sorted(ids) == list(range(min(ids), max(ids) + 1))
        numbers = got.spans[0, : len(ids), 0].float()
        assert (got.keys[0, : len(ids)] == numbers.view(-1, 1, 1, 1, 1)).all()
        assert (got.values[0, : len(ids)] == -numbers.view(-1, 1, 1, 1, 1)).all()
        assert (got.scores[0, 1:] <= got.scores[0, :-1]).all()


@pytest.mark.slow
@pytest.mark.timeout(120 + 2 * SECONDS)
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_crowd_at_one_bank(backend, tmp_path):
    name, options = BACKENDS[backend]
    bank = create_bank(name, DIM, max_chunks=MOST, **options)
    crowd = Crowd(bank, tmp_path / "bank")
    crowd.run()
    assert not crowd.errors, crowd.errors
    assert all(crowd.calls.values()), crowd.calls
    assert sorted(crowd.of_id) == list(range(bank.next_id))  # no chunk was lost on its way in
    chunks = bank.fetch(bank.ids)
    assert chunks.spans[:, 0].tolist() == [crowd.of_id[each] for each in bank.ids.tolist()]
    assert (chunks.keys == chunks.spans[:, 0].view(-1, 1, 1, 1, 1)).all()
