"""An interrupt at any line of a save or a load: the next one works, and holds what it should."""

from __future__ import annotations

import os
import signal
import sys
import threading
from concurrent.futures import thread as pool_of_threads
from pathlib import Path

import pytest
import torch

import memlong.bank.snapshot
from memlong import create_bank, load_bank
from memlong.bank.forks import fork_lock
from memlong.bank.snapshot import hashing, locking
from memlong.bank.snapshot.locking import FolderLock
from memlong.testing.harness import DIM, random_chunks

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed file:ResourceWarning"
)
by_lines = pytest.mark.skipif(
    sys.version_info >= (3, 12),
    reason="from Python 3.12 on an interrupt comes at other places than before a line",
)
HERE = Path(memlong.bank.snapshot.__file__).parent
FILES = {
    *(str(HERE / f"{name}.py") for name in ("files", "hashing", "lazy", "locking", "writer")),
    *(module.__file__ for module in (threading, pool_of_threads)),
}


@pytest.fixture
def interrupted(interrupting):
    return interrupting(FILES)


@pytest.fixture
def bank(monkeypatch):
    monkeypatch.setattr(hashing, "_LARGE", 1)  # by a thread, however small
    bank = create_bank("torch", DIM)
    random_chunks(3).into(bank)
    return bank


@pytest.fixture(autouse=True)
def hangs_are_told():
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for ever"))
    yield
    signal.alarm(0)


def same(one, other):
    ids = one.ids.tolist()
    return ids == other.ids.tolist() and torch.equal(one.fetch(ids).keys, other.fetch(ids).keys)


@pytest.mark.slow
@by_lines
@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="needs alarms")
def test_at_any_line_of_a_save(bank, tmp_path, interrupted):
    at = 0
    bank.save(tmp_path)
    while interrupted(lambda: bank.save(tmp_path, compact=True), at):
        signal.alarm(20)
        assert same(load_bank(tmp_path), bank)
        bank.save(tmp_path)
        assert "lock" not in {path.name for path in tmp_path.iterdir()}
        at += 1
    assert at > 100


@pytest.mark.slow
@by_lines
@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="needs alarms")
@pytest.mark.parametrize("lazy", [False, True])
def test_at_any_line_of_a_load(bank, tmp_path, lazy, interrupted):
    at = 0
    bank.save(tmp_path)
    while interrupted(lambda: load_bank(tmp_path, lazy=lazy), at):
        signal.alarm(20)
        assert same(load_bank(tmp_path, lazy=lazy), bank)
        at += 1
    assert at > 100


def test_an_interrupt_while_a_lock_is_taken_does_not_leave_it(bank, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(locking.os, "ftruncate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bank.save(tmp_path)
    bank.save(tmp_path)
    assert same(load_bank(tmp_path), bank)


def test_a_lock_that_nobody_can_let_go_of_goes_with_its_object(tmp_path):
    around = [FolderLock(tmp_path).__enter__()]
    around.append(around)
    del around
    with FolderLock(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_no_other_thread_is_no_reason_not_to_load(bank, tmp_path, monkeypatch):
    def none_left(*_):
        raise RuntimeError("can't start new thread")

    bank.save(tmp_path)
    monkeypatch.setattr(hashing._thread, "start_new_thread", none_left)
    assert same(load_bank(tmp_path), bank)


def test_a_thread_whose_owner_was_interrupted_ends(bank, monkeypatch):
    monkeypatch.setattr(hashing, "_PATIENCE", 0.01)
    before = hashing._thread._count()
    for _ in range(20):
        hashing.Hashing().update(bytes(10))
    until = threading.Event()
    for _ in range(500):
        if hashing._thread._count() == before:
            break
        until.wait(0.01)
    assert hashing._thread._count() == before


def test_a_lock_that_goes_swallows_no_interrupt():
    """What is called when an object goes is Python's own: an interrupt that comes there would only be printed."""
    locks = [fork_lock() for _ in range(3)]
    called = []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
    try:
        locks.clear()
    finally:
        sys.setprofile(None)
    assert called == []
