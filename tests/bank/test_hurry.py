"""What a user in a hurry does with banks: right, or refused with what to do instead."""

from __future__ import annotations

import pytest

from memlong import BankPool, create_bank, load_bank
from memlong.bank import TieredStore
from memlong.errors import InvalidArgumentError, MemlongError, SnapshotError, UnknownNameError
from memlong.testing.harness import DIM, random_chunks, random_vectors


@pytest.fixture
def bank():
    made = create_bank("torch", DIM)
    random_chunks(5).into(made)
    return made


def test_a_tilde_is_the_users_home(bank, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    bank.save("~/saved")
    assert len(load_bank("~/saved")) == 5
    pool = BankPool("~/sessions", lambda: create_bank("torch", DIM), load_bank, budget="1MB")
    pool.close()
    (tmp_path / "home" / "disk").mkdir()
    tiered = create_bank("torch", DIM, store=TieredStore(host=0, disk="~/disk"))
    random_chunks(3).into(tiered)
    assert len(load_bank("~/saved", store=TieredStore(disk="~/disk"))) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_file_in_the_folders_place_is_said_to_be_one(bank, tmp_path):
    bank.save(tmp_path)
    with pytest.raises(SnapshotError, match=r"manifest.json' is a file. Name the folder"):
        load_bank(tmp_path / "manifest.json")


def test_load_is_not_called_on_a_bank_that_it_would_leave_as_it_is(bank, tmp_path):
    bank.save(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"makes a new TorchBank.*new = TorchBank.load\(path"):
        create_bank("torch", DIM).load(tmp_path)
    assert len(type(bank).load(tmp_path)) == 5


@pytest.mark.parametrize("name", [8, None, ["torch"]])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(
        UnknownNameError, match="a backend is asked for by its name, such as 'my-index', got "
    ):
        create_bank(name, 8)


@pytest.mark.parametrize("place", ["make", "load"])
def test_a_pool_is_given_functions(tmp_path, place):
    given = {"make": lambda: create_bank("torch", DIM), "load": load_bank, place: create_bank("torch", DIM)}
    with pytest.raises(InvalidArgumentError, match=f"{place} must be a function.*got TorchBank"):
        BankPool(tmp_path / "pool", budget=1, **given)
    assert not (tmp_path / "pool").exists()


def test_a_long_list_is_not_all_of_a_message():
    chunks = random_chunks(200)
    with pytest.raises(InvalidArgumentError, match=r"of type list$") as caught:
        create_bank("torch", DIM).add(chunks.embeddings.tolist(), chunks.keys, chunks.values, chunks.spans)
    assert len(str(caught.value)) < 250


def test_a_store_is_an_object_here(bank):
    with pytest.raises(InvalidArgumentError, match=r"such as TieredStore\(host='2GB'"):
        create_bank("torch", DIM, store={"host": "2GB"})


def test_a_bank_that_a_pool_has_let_go_of_takes_no_chunks_that_would_be_lost(tmp_path):
    pool = BankPool(tmp_path, lambda: create_bank("torch", DIM), load_bank, budget=0)
    with pool.session("a") as kept:
        random_chunks(3).into(kept)
    for change in (lambda: random_chunks(1, first=3).into(kept), lambda: kept.remove([0]), kept.reset):
        with pytest.raises(MemlongError, match="dropped it from memory"):
            change()
    assert len(kept.search(random_vectors(1), 5).ids) == 1
    with pool.session("a") as bank:
        random_chunks(1, first=3).into(bank)
        assert len(bank) == 4
    pool.close()


def test_a_session_that_could_not_be_saved_goes_on(tmp_path, monkeypatch):
    pool = BankPool(tmp_path, lambda: create_bank("torch", DIM), load_bank, budget="1GB")
    with pool.session("a") as bank:
        random_chunks(3).into(bank)
    monkeypatch.setattr("memlong.bank.sessions.pool.save", lambda _: [SnapshotError("the disk is full")])
    with pytest.raises(SnapshotError, match="the disk is full"):
        pool.close()
    random_chunks(1, first=3).into(bank)
    monkeypatch.undo()
    pool.close()
    assert len(load_bank(next(tmp_path.glob("session-*")))) == 4
