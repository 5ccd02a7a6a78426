"""The contract of threads: many may search while one writes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

from memlong.bank import MemoryBank
from memlong.testing.harness import BankSuite, random_chunks, random_vectors


class ThreadTests(BankSuite):
    """Concurrent searching and writing."""

    def test_searches_are_whole_while_another_thread_writes(self) -> None:
        """Every hit has its own K-V and span, and no search fails, while chunks are added and removed."""
        bank, done = self.make(max_chunks=80), Event()
        random_chunks(40).into(bank)
        with ThreadPoolExecutor(4) as pool:
            readers = [pool.submit(_read, bank, done, seed) for seed in range(3)]
            pool.submit(_write, bank, done).result()
            assert all(reader.result() > 0 for reader in readers)
        assert _read(bank, done, seed=3) == 1  # chunks retrieved so far may all be evicted
        assert int(bank.usage.retrievals.sum()) > 0
        assert len(bank) == 80


def _write(bank: MemoryBank, done: Event) -> None:
    try:
        for turn in range(40):
            first = 40 + 5 * turn
            random_chunks(5, seed=turn, first=first).into(bank)
            if turn % 4 == 0 and turn < 20:
                bank.remove(bank.ids[1:4])
    finally:
        done.set()


def _read(bank: MemoryBank, done: Event, seed: int) -> int:
    reads = 0
    while not done.is_set() or not reads:
        got = bank.retrieve(random_vectors(3, seed=seed + reads), 6)
        numbers = got.ids.view(3, 6, 1, 1, 1, 1)
        assert got.found.all()
        assert (got.keys == numbers).all()
        assert (got.values == -numbers).all()
        assert (got.spans[..., 0] == 3 * got.ids).all()
        assert (got.scores[:, 1:] <= got.scores[:, :-1]).all()
        reads += 1
    return reads
