"""A forked process and its parent: each bank goes on as if it were alone, or says why it cannot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from contextlib import contextmanager

import pytest
import torch

from memlong import BankPool, create_bank, load_bank
from memlong.bank import TieredStore
from memlong.bank.forks import fork_lock, free_after_fork, unless_forked
from memlong.bank.snapshot.locking import FolderLock
from memlong.errors import MemlongError, StorageError

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]
SHAPE = (1, 1, 2, 2)


def add(bank, count=4, mark=0):
    """Add chunks all of whose keys are their id, and a mark."""
    ids = range(bank.next_id, bank.next_id + count)
    blocks = torch.tensor(ids, dtype=torch.float32).view(-1, 1, 1, 1, 1).repeat(1, *SHAPE) + mark
    vectors = torch.stack([torch.tensor([1.0, i, i * i, 0.5]) for i in ids])
    return bank.add(vectors, blocks, -blocks, [(i, i + 1) for i in ids])


def keys(bank, ids):
    return bank.fetch(ids).keys[:, 0, 0, 0, 0].tolist()


class Child:
    """A forked process that does something, now or when it is told to, and dies if that takes long."""

    def __init__(self, act, *, waits=False):
        at_start, self._go = os.pipe()
        self._said, at_end = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self._go)
            status = 1
            try:
                signal.alarm(20)
                os.read(at_start, 1)
                act()
                status = 0
            except BaseException:  # noqa: BLE001 - told to the parent
                os.write(at_end, traceback.format_exc().encode())
            finally:
                os._exit(status)
        os.close(at_start)
        os.close(at_end)
        if not waits:
            self.go()

    def go(self):
        if self._go is not None:
            os.close(self._go)
        self._go = None

    def end(self):
        self.go()
        with os.fdopen(self._said) as said:
            text = said.read()
        status = os.waitpid(self.pid, 0)[1]
        assert status == 0, text or f"the child ended with {status}"


@pytest.fixture(params=["host-disk", "disk"])
def bank(request, tmp_path):
    bank = create_bank(
        "torch", 4, store=TieredStore(host="64" if "host" in request.param else None, disk=tmp_path)
    )
    add(bank)
    return bank


def test_what_a_child_adds_and_removes_is_its_own(bank):
    def act():
        assert add(bank, mark=1000).tolist() == [4, 5, 6, 7]
        assert keys(bank, range(8)) == [0, 1, 2, 3, 1004, 1005, 1006, 1007]
        bank.remove([0, 2, 4])
        assert keys(bank, [1, 3, 5, 6, 7]) == [1, 3, 1005, 1006, 1007]
        grandchild = Child(lambda: (add(bank, mark=2000), nested()))
        grandchild.end()
        assert keys(bank, [1, 3, 5, 6, 7]) == [1, 3, 1005, 1006, 1007]

    def nested():
        assert keys(bank, [1, 3, 5, 8, 9]) == [1, 3, 1005, 2008, 2009]

    child = Child(act, waits=True)
    add(bank)
    child.end()
    assert keys(bank, range(8)) == list(range(8))
    bank.remove([7])
    assert keys(bank, range(7)) == list(range(7))


def test_many_processes_read_at_once(tmp_path):
    bank = create_bank("torch", 4, store=TieredStore(disk=tmp_path))
    add(bank, 50)
    bank.save(tmp_path / "saved")
    lazy = load_bank(tmp_path / "saved", lazy=True)

    def act():
        for _ in range(40):
            assert keys(bank, range(50)) == keys(lazy, range(50)) == list(range(50))

    children = [Child(act) for _ in range(3)]
    act()
    for child in children:
        child.end()


def test_a_child_refuses_to_read_what_may_be_another_chunks(tmp_path):
    bank = create_bank("torch", 4, max_chunks=4, store=TieredStore(disk=tmp_path))
    add(bank)

    def act():
        with pytest.raises(
            StorageError, match=rf"belongs to process {os.getppid()}, from which this one was forked"
        ):
            bank.fetch([0])
        bank.reset()
        add(bank)
        assert keys(bank, [4, 5, 6, 7]) == [4, 5, 6, 7]

    child = Child(act, waits=True)
    add(bank, 1)  # takes the place of chunk 0
    child.end()
    assert keys(bank, [1, 2, 3, 4]) == [1, 2, 3, 4]


@contextmanager
def other_thread(act):
    stop = threading.Event()

    def work():
        while not stop.is_set():
            act()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("backend", ["torch", "faiss", "hnswlib"])
def test_a_child_does_not_wait_for_threads_that_it_does_not_have(backend):
    bank = create_bank(backend, 64)
    vectors, blocks = torch.randn(4000, 64), torch.zeros(4000, 1, 1, 1, 2)
    bank.add(vectors, blocks, blocks, [(i, i + 1) for i in range(4000)])

    def act():
        bank.add(vectors[:1], blocks[:1], blocks[:1], [(0, 1)])
        assert bank.search(vectors[1:2], 1).ids.tolist() == [[1]]

    with other_thread(lambda: bank.search(vectors[:50], 5)):
        for _ in range(4):
            Child(act).end()


def test_a_child_undoes_what_another_thread_was_adding(tmp_path):
    bank = create_bank("torch", 4, store=TieredStore(disk=tmp_path))
    add(bank)
    inside, go_on = threading.Event(), threading.Event()
    put = bank.state.store.put

    def slow(*given):
        put(*given)
        inside.set()
        go_on.wait(20)

    def act():
        assert len(bank) == 4
        bank.state.store.put = put
        assert add(bank, 2, mark=1000).tolist() == [4, 5]
        assert keys(bank, range(6)) == [0, 1, 2, 3, 1004, 1005]

    bank.state.store.put = slow
    thread = threading.Thread(target=add, args=(bank,))
    thread.start()
    inside.wait(20)
    try:
        Child(act).end()
    finally:
        go_on.set()
        thread.join()
    assert keys(bank, range(8)) == list(range(8))


@pytest.mark.parametrize("lock", [fork_lock(), free_after_fork(threading.RLock())], ids=["Lock", "RLock"])
def test_a_lock_of_another_thread_is_free_in_a_child(lock):
    inside, go_on = threading.Event(), threading.Event()

    def hold():
        with lock:
            inside.set()
            go_on.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(20)
    try:
        Child(lambda: lock.acquire(timeout=5) or sys.exit(1)).end()
    finally:
        go_on.set()
        thread.join()


def test_a_pool_is_one_process_alone(tmp_path):
    pool = BankPool(tmp_path / "pool", lambda: create_bank("torch", 4), load_bank, budget="1GB")
    with pool.session("a") as bank:
        add(bank)

    def act():
        for use in (lambda: pool.session("a").__enter__(), pool.flush, pool.close, lambda: pool.delete("a")):
            with pytest.raises(MemlongError, match=rf"made by process {os.getppid()}, .*Make a pool in"):
                use()

    Child(act).end()
    with pytest.raises(MemlongError, match="is held by process"):
        FolderLock(tmp_path / "pool").__enter__()
    pool.close()


def test_what_ends_with_a_process_does_not_end_with_its_child(tmp_path):
    ended = tmp_path / "ended"
    end = unless_forked(ended.touch)
    Child(end).end()
    assert not ended.exists()
    end()
    assert ended.exists()


def test_a_fork_of_a_locker_does_not_hold_up_who_comes_next(tmp_path):
    held = FolderLock(tmp_path).__enter__()
    spare = os.dup(held._number)  # a child between its fork and what comes after
    try:
        held.__exit__(None, None, None)
        with FolderLock(tmp_path):
            pass
    finally:
        os.close(spare)


MANY_THREADS = """
import os, signal, sys, torch
from memlong import create_bank
torch.set_num_threads(2)
options = {"faiss": {"index": "IVF8,Flat", "build_threads": 2}}.get(sys.argv[1], {})
bank = create_bank(sys.argv[1], 64, **options)
vectors, blocks = torch.randn(8000, 64), torch.zeros(8000, 1, 1, 1, 2)
spans = [(i, i + 1) for i in range(8000)]
def work():
    bank.add(vectors, blocks, blocks, spans)
    bank.search(vectors[:200], 5)
    return vectors @ vectors.T
work()
child = os.fork()
if not child:
    signal.alarm(30)
    work()
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""


@pytest.mark.parametrize("backend", ["torch", "faiss", "hnswlib"])
def test_a_child_computes_though_its_parent_had_many_threads(backend):
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", MANY_THREADS, backend], check=True, env=environment, timeout=100)
