"""A bank for each session: apart from all others, on disk when idle, gone when deleted."""

from __future__ import annotations

import shutil
import threading

import numpy as np
import pytest

from memlong import BankPool, SnapshotError, create_bank, load_bank
from memlong.bank import TieredStore
from memlong.bank.snapshot.locking import FolderLock
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.testing.harness import DIM, random_chunks, random_vectors

ONE = 4 * DIM + 2 * random_chunks(1).keys.nbytes


@pytest.fixture(params=["torch", "hnswlib"])
def make_pool(request, tmp_path):
    def made(chunks=25):
        return BankPool(
            tmp_path / "pool", lambda: create_bank(request.param, DIM), load_bank, budget=chunks * ONE
        )

    return made


def test_each_session_has_what_it_was_given(make_pool):
    pool = make_pool()
    for number in range(8):
        with pool.session(f"user {number}") as bank:
            random_chunks(10, seed=number, first=100 * number).into(bank)
    for number in reversed(range(8)):
        with pool.session(f"user {number}") as bank:
            got = bank.retrieve(random_vectors(3), 12)
            assert sorted(set(got.keys.flatten(2)[..., 0].unique().tolist()) - {0.0}) == [
                each for each in range(100 * number, 100 * number + 10) if each
            ]
    assert len(pool) == 8


def test_idle_sessions_are_spilled_and_brought_back(make_pool):
    pool = make_pool(chunks=25)
    for number in range(5):
        with pool.session(str(number)) as bank:
            random_chunks(10, seed=number).into(bank)
            bank.retrieve(random_vectors(2), 1)
        assert pool.nbytes <= 25 * ONE
    assert pool.in_memory == 2
    assert len(pool) == 5
    with pool.session("0") as bank:
        assert len(bank) == 10
        assert int(bank.usage.retrievals.sum()) == 2
    with pool.session("4"):
        assert pool.in_memory == 2  # "3" had to go: it was used longest ago


def test_sessions_in_use_are_not_spilled(make_pool):
    pool = make_pool(chunks=5)
    with pool.session("a") as one, pool.session("b") as other:
        random_chunks(10).into(one)
        random_chunks(10).into(other)
        assert pool.in_memory == 2
        with pool.session("a") as same:
            assert same is one
    assert pool.in_memory == 0


def test_a_deleted_session_is_gone(make_pool, tmp_path):
    pool = make_pool(chunks=0)
    with pool.session("secret") as bank:
        random_chunks(3, first=777).into(bank)
    number = np.full(4, 778, dtype=np.float32).tobytes()

    def is_there():
        return any(number in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

    assert is_there()
    assert "secret" in pool
    assert pool.delete("secret")
    assert not is_there()
    assert "secret" not in pool
    assert not pool.delete("secret")
    with pool.session("secret") as bank:
        assert (len(bank), bank.next_id) == (0, 0)


def test_a_session_in_use_is_not_deleted(make_pool):
    pool = make_pool()
    with pool.session("a") as bank:
        random_chunks(2).into(bank)
        with pytest.raises(InvalidArgumentError, match="session 'a' is in use by 1 `with` blocks"):
            pool.delete("a")
        assert len(bank) == 2
    assert pool.delete("a")


def test_another_pool_goes_on(make_pool):
    with make_pool().session("a") as bank:
        random_chunks(4).into(bank)
    first = make_pool()
    with first.session("a") as bank:
        assert len(bank) == 0  # never saved
        random_chunks(4).into(bank)
    first.flush()
    assert first.in_memory == 1
    with pytest.raises(SnapshotError, match=r"pool/lock.*held by process"):
        make_pool()
    first.close()
    assert first.in_memory == 0
    first.close()
    with pytest.raises(MemlongError, match="closed"), first.session("a"):
        pass
    with make_pool().session("a") as bank:
        assert len(bank) == 4


@pytest.mark.parametrize("session_id", ["../../etc", "/etc/passwd", "a/b", ".", "\0", "é" * 500, "\ud800"])
def test_no_id_leads_out_of_the_folder(make_pool, tmp_path, session_id):
    pool = make_pool(chunks=0)
    with pool.session(session_id) as bank:
        random_chunks(1).into(bank)
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]
    folder, lock = sorted((tmp_path / "pool").iterdir(), reverse=True)
    assert (folder.name[:8], lock.name) == ("session-", "lock")
    assert pool.delete(session_id)


@pytest.mark.parametrize("session_id", ["", None, 3, "x" * 2000])
def test_an_id_must_be_text(make_pool, session_id):
    with (
        pytest.raises(InvalidArgumentError, match="session_id must be text"),
        make_pool().session(session_id),
    ):
        pass


def test_a_bank_is_never_shared(tmp_path):
    shared = create_bank("torch", DIM)
    pool = BankPool(tmp_path, lambda: shared, load_bank, budget="1GB")
    with (
        pool.session("a"),
        pytest.raises(InvalidArgumentError, match="the bank of another session"),
        pool.session("b"),
    ):
        pass
    random_chunks(1).into(shared)
    with pytest.raises(InvalidArgumentError, match="sessions would share one"), pool.session("c"):
        pass


def test_a_damaged_session_says_so_and_leaves_the_others(make_pool, tmp_path):
    pool = make_pool(chunks=0)
    for name in "ab":
        with pool.session(name) as bank:
            random_chunks(2).into(bank)
    damaged = pool._folder_of("a") / "manifest.json"
    damaged.write_text("{}")
    with pytest.raises(SnapshotError, match=r"manifest\.json"), pool.session("a"):
        pass
    with pool.session("b") as bank:
        assert len(bank) == 2
    assert pool.delete("a")


def fill_and_fail(bank):
    random_chunks(1).into(bank)
    bank.search(random_vectors(1), 0)


def test_an_error_in_the_block_gives_the_session_back(make_pool):
    pool = make_pool()
    with pytest.raises(InvalidArgumentError), pool.session("a") as bank:
        fill_and_fail(bank)
    assert pool.delete("a")


def test_after_an_error_in_the_block_room_is_made_too(make_pool):
    pool = make_pool(chunks=0)
    with pytest.raises(InvalidArgumentError), pool.session("a") as bank:
        fill_and_fail(bank)
    assert pool.in_memory == 0


@pytest.mark.slow
def test_many_threads_and_sessions(make_pool):
    pool, errors = make_pool(chunks=12), []

    def work(seed):
        generator = np.random.default_rng(seed)
        try:
            for _ in range(25):
                session = int(generator.integers(5))
                with pool.session(str(session)) as bank:
                    # All of a session's numbers are its own.
                    random_chunks(1, seed=bank.next_id, first=1000 * (session + 1)).into(bank)
                    got = bank.retrieve(random_vectors(1), 1)
                    assert (got.keys == 1000 * (session + 1)).all()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    total = 0
    for session in range(5):
        with pool.session(str(session)) as bank:
            total += len(bank)
    assert total == 6 * 25  # no add was lost between memory and disk


def test_a_session_that_was_never_written_to_is_dropped(make_pool):
    pool = make_pool()
    for number in range(5):
        with pool.session(str(number)) as bank:
            bank.search(random_vectors(1), 1)
            pool.flush()
    assert (pool.in_memory, len(pool)) == (0, 0)


@pytest.fixture
def with_a_bad_one(make_pool):
    """A pool of the sessions a, bad and c, of which the second cannot be saved."""
    pool = make_pool()
    for name in ("a", "bad", "c"):
        with pool.session(name) as bank:
            random_chunks(5).into(bank)
    pool._folder_of("bad").write_text("no folder")
    return pool


def test_a_session_that_cannot_be_saved_keeps_no_other_from_it(with_a_bad_one):
    pool = with_a_bad_one
    for action in (pool.flush, pool.close):
        with pytest.raises(SnapshotError, match=pool._folder_of("bad").name):
            action()
    assert pool.in_memory == 1  # and the pool goes on
    with pool.session("c") as bank:
        assert len(bank) == 5
    pool._folder_of("bad").unlink()
    pool.close()
    assert len(pool) == 3


def test_sessions_that_cannot_be_saved_are_named_together(with_a_bad_one):
    pool = with_a_bad_one
    pool._folder_of("c").write_text("no folder")
    with pytest.raises(SnapshotError, match="2 sessions could not be saved") as caught:
        pool.flush()
    assert len(caught.value.__cause__.exceptions) == 2
    assert all(pool._folder_of(name).name in str(caught.value) for name in ("bad", "c"))


def test_the_session_of_another_goes_on_when_one_cannot_be_saved(with_a_bad_one):
    pool = with_a_bad_one
    with pytest.warns(RuntimeWarning, match="could not be saved to make room"), pool.session("d") as bank:
        random_chunks(20).into(bank)
    assert pool.nbytes <= 25 * ONE
    assert pool.in_memory == 2  # "bad" and "d"


def test_what_could_not_be_deleted_is_there_as_a_whole(make_pool):
    pool = make_pool(chunks=0)
    with pool.session("a") as bank:
        random_chunks(3).into(bank)
    with (
        FolderLock(pool._folder_of("a")),
        pytest.raises(SnapshotError, match="held by process"),
    ):
        pool.delete("a")
    with pool.session("a") as bank:
        assert len(bank) == 3


def test_a_deletion_that_was_cut_off_is_ended_by_the_next_pool(make_pool, tmp_path, monkeypatch):
    pool = make_pool(chunks=0)
    with pool.session("a") as bank:
        random_chunks(3).into(bank)

    def cut_off(folder):
        raise OSError(5, "the power went")

    monkeypatch.setattr(shutil, "rmtree", cut_off)
    with pytest.raises(SnapshotError, match=r"deleted-.*cannot be removed: the power went"):
        pool.delete("a")
    monkeypatch.undo()
    assert "a" not in pool
    assert len(pool) == 0
    pool.close()
    assert make_pool().in_memory == 0
    assert list((tmp_path / "pool").iterdir()) == []


def test_a_pool_in_use_is_not_closed(make_pool):
    pool = make_pool()
    with pool.session("a") as bank:
        with pytest.raises(InvalidArgumentError, match="1 sessions are in use"):
            pool.close()
        random_chunks(1).into(bank)
    pool.close()


def test_what_load_returns_is_checked(tmp_path):
    shared = create_bank("torch", DIM)
    given = [shared, shared, None]
    pool = BankPool(tmp_path, lambda: create_bank("torch", DIM), lambda _: given.pop(0), budget=0)
    for name in "ab":
        with pool.session(name) as bank:
            random_chunks(1).into(bank)
    with pool.session("a") as bank:
        assert bank is shared
        with (
            pytest.raises(
                InvalidArgumentError, match="load must return a new bank each time, got the bank of another"
            ),
            pool.session("b"),
        ):
            pass
        with (
            pytest.raises(InvalidArgumentError, match="load must return a MemoryBank, got None"),
            pool.session("b"),
        ):
            pass


def test_what_is_on_disk_does_not_count(tmp_path):
    def load(folder):
        return load_bank(folder, lazy=True)

    def on_disk():
        return create_bank("torch", DIM, store=TieredStore(disk=tmp_path))

    pool = BankPool(tmp_path / "pool", on_disk, load, budget=25 * ONE)
    for name in "abc":
        with pool.session(name) as bank:
            random_chunks(10).into(bank)
    assert pool.nbytes == 3 * 10 * 4 * DIM
    pool.close()
    pool = BankPool(tmp_path / "pool", on_disk, load, budget=25 * ONE)
    for name in "abc":
        with pool.session(name) as bank:
            assert len(bank) == 10
    assert pool.nbytes == 3 * 10 * 4 * DIM
    assert pool.in_memory == 3


def test_nobody_else_may_look_into_the_folders(make_pool, tmp_path):
    pool = make_pool(chunks=0)
    with pool.session("a") as bank:
        random_chunks(1).into(bank)
    for folder in (tmp_path / "pool", pool._folder_of("a")):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_is_gone_is_named(make_pool, tmp_path):
    pool = make_pool()
    shutil.rmtree(tmp_path / "pool")
    with pytest.raises(SnapshotError, match=r"pool' cannot be read"):
        len(pool)
