"""A bank for each session: apart from all others, on disk when idle, gone when deleted."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from memlong import BankPool, SnapshotError, create_bank, load_bank
from memlong.errors import InvalidArgumentError
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
    first.close()
    assert first.in_memory == 0
    with make_pool().session("a") as bank:
        assert len(bank) == 4


@pytest.mark.parametrize("session_id", ["../../etc", "/etc/passwd", "a/b", ".", "\0", "é" * 500, "\ud800"])
def test_no_id_leads_out_of_the_folder(make_pool, tmp_path, session_id):
    pool = make_pool(chunks=0)
    with pool.session(session_id) as bank:
        random_chunks(1).into(bank)
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]
    (folder,) = (tmp_path / "pool").iterdir()
    assert folder.name.startswith("session-")
    assert pool.delete(session_id)


@pytest.mark.parametrize("session_id", ["", None, 3, "x" * 2000])
def test_an_id_must_be_text(make_pool, session_id):
    with pytest.raises(InvalidArgumentError, match="session_id is"), make_pool().session(session_id):
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


def test_an_error_in_the_block_gives_the_session_back(make_pool):
    pool = make_pool()
    with pytest.raises(InvalidArgumentError), pool.session("a") as bank:
        bank.search(random_vectors(1), 0)
    assert pool.delete("a")


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
