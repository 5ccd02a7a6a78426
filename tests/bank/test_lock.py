"""The readers-writer lock."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread

from memlong.bank.lock import ReadWriteLock


def test_readers_are_in_together():
    lock, together = ReadWriteLock(), Barrier(3, timeout=10)

    def read():
        with lock.read():
            together.wait()

    with ThreadPoolExecutor(3) as pool:
        for reader in [pool.submit(read) for _ in range(3)]:
            reader.result()


def test_a_writer_is_alone():
    lock, inside, worst = ReadWriteLock(), [0, 0], []

    def work(writes):
        for _ in range(200):
            with lock.write() if writes else lock.read():
                inside[writes] += 1
                worst.append(inside[1] > 1 or (inside[1] == 1 and inside[0] > 0))
                inside[writes] -= 1

    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(work, number % 2) for number in range(4)]:
            job.result()
    assert not any(worst)


def test_a_waiting_writer_goes_before_later_readers():
    lock, order, writer_waits = ReadWriteLock(), [], Event()

    def write():
        writer_waits.set()
        with lock.write():
            order.append("writer")

    def read():
        with lock.read():
            order.append("reader")

    with lock.read():
        writer = Thread(target=write)
        writer.start()
        writer_waits.wait(10)
        while not lock._writers_waiting:
            pass
        reader = Thread(target=read)
        reader.start()
        reader.join(0.05)
        assert order == []
    writer.join(10)
    reader.join(10)
    assert order == ["writer", "reader"]


def test_an_error_inside_lets_the_lock_go():
    lock = ReadWriteLock()
    for hold in (lock.read, lock.write):
        try:
            with hold():
                raise KeyError
        except KeyError:
            pass
    with lock.write():
        pass
