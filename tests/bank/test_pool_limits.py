"""A pool of many sessions, with few files, in a process that goes elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from memlong import BankPool, SnapshotError, create_bank, load_bank
from memlong.bank import TieredStore
from memlong.bank.sessions import pool as pool_module
from memlong.bank.sessions import sessions
from memlong.testing.harness import DIM, random_chunks


def make():
    return create_bank("torch", DIM)


def test_a_pool_stays_where_it_is_when_the_process_goes_elsewhere(tmp_path, monkeypatch):
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    monkeypatch.chdir(home)
    pool = BankPool("sessions", make, load_bank, budget=0)
    for folder in (home, away):
        monkeypatch.chdir(folder)
        with pool.session("alice") as bank:
            random_chunks(1, first=len(bank)).into(bank)
    pool.close()
    assert list(away.iterdir()) == []
    with BankPool(home / "sessions", make, load_bank, budget=0).session("alice") as bank:
        assert len(bank) == 2


def test_a_disk_tier_stays_where_it_is_when_the_process_goes_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "tier").mkdir()
    monkeypatch.chdir(tmp_path)
    store = TieredStore(disk="tier")
    monkeypatch.chdir("/")
    bank = create_bank("torch", DIM, store=store)
    chunks = random_chunks(3)
    chunks.into(bank)
    bank.reset()
    chunks.into(bank)
    assert len(bank) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="a folder in use cannot be removed elsewhere")
def test_a_folder_relative_to_one_that_is_gone_is_refused(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for use in (lambda: TieredStore(disk="tier"), lambda: BankPool("sessions", make, load_bank, budget=0)):
        with pytest.raises(ValueError, match="is relative, but the working directory cannot be found"):
            use()


@pytest.fixture
def few_files(monkeypatch):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 32
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * used + 60, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("kind", ["lazy", "disk"])
def test_sessions_are_spilled_before_files_run_out(tmp_path, kind, few_files):
    def load(path):
        if kind == "lazy":
            return load_bank(path, lazy=True)
        return load_bank(path, store=TieredStore(disk=tmp_path))

    for size in (1, 2):
        pool = BankPool(tmp_path / "pool", make, load, budget="1GB")
        for number in range(150):
            with pool.session(str(number)) as bank:
                random_chunks(1, first=len(bank)).into(bank)
                assert len(bank) == size
        assert 10 < pool.in_memory <= 150
        pool.close()


def test_a_session_takes_no_longer_where_there_are_many(tmp_path):
    def measured(count):
        pool = BankPool(tmp_path / str(count), make, load_bank, budget="10GB")
        chunks = random_chunks(1)
        for number in range(count):
            with pool.session(str(number)) as bank:
                chunks.into(bank)
        best = float("inf")
        for _ in range(30):
            start = time.perf_counter()
            with pool.session("0"):
                pass
            best = min(best, time.perf_counter() - start)
        return best

    few, many = measured(10), measured(1500)
    assert many < 10 * few  # it was 200 times as long


def test_what_others_take_is_told_as_it_is(tmp_path):
    one = 4 * DIM + 2 * random_chunks(1).keys.nbytes
    pool = BankPool(tmp_path, make, load_bank, budget=12 * one)
    with pool.session("a") as held:
        random_chunks(4).into(held)
        for name in "bcd":
            with pool.session(name) as bank:
                random_chunks(4).into(bank)
        assert pool.in_memory == 3
        random_chunks(8).into(held)  # 12, alone as many as there is room for
        with pool.session("d") as bank:
            bank.remove([0])
        assert pool.in_memory == 1
        assert pool.nbytes == 12 * one
    assert pool.in_memory == 1


def test_sessions_that_cannot_be_saved_do_not_keep_others_in_memory(tmp_path, monkeypatch):
    one = 4 * DIM + 2 * random_chunks(1).keys.nbytes
    pool = BankPool(tmp_path, make, load_bank, budget=5 * one)
    with pool.session("a") as bank:
        random_chunks(4).into(bank)

    def fail(*_, **__):
        raise SnapshotError("no")

    monkeypatch.setattr(bank, "save", fail, raising=False)
    with pytest.warns(RuntimeWarning, match="could not be saved to make room"), pool.session("b") as bank:
        random_chunks(2).into(bank)
    assert [session.name for session in pool._sessions] == ["a"]


@pytest.mark.slow
def test_an_interrupt_at_any_line_of_a_session_leaves_a_pool_that_can_be_closed(tmp_path, interrupting):
    interrupted = interrupting({pool_module.__file__, sessions.__file__})
    at, more = 0, True
    while more:
        pool = BankPool(tmp_path / str(at), make, load_bank, budget=0)

        def use(pool=pool):
            with pool.session("a") as bank:
                random_chunks(1).into(bank)

        use()
        more = interrupted(use, at)
        with pool.session("a") as bank:
            assert len(bank) in (1, 2)
        assert pool.in_memory == 0
        pool.close()
        at += 1
    assert at > 50
