"""Sessions: nobody sees another's chunks, and what has a name stays."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memlong.errors import InvalidArgumentError
from memlong.testing.harness import DIM, random_chunks
from memlong_milvus.bank import MilvusBank
from memlong_milvus.collection import find_collection
from memlong_milvus.rows import SessionRows
from memlong_milvus.sessions import LEAST_UNNAMED, Session


@pytest.fixture
def place(tmp_path: Path) -> dict[str, Any]:
    """A lasting local file."""
    return {"uri": str(tmp_path / "memory.db")}


def test_sessions_in_one_collection_never_see_each_other(place: dict[str, Any]) -> None:
    banks = [MilvusBank(DIM, **place, collection="shared", session=name) for name in ("a", "b")]
    for bank in banks:
        random_chunks(40).into(bank)
    banks[0].remove(range(20))
    query = random_chunks(1).embeddings
    assert 0 not in banks[0].search(query, 40).ids.tolist()[0]
    assert banks[1].search(query, 1).ids.tolist() == [[0]]
    assert sorted(banks[1].search(query, 40).ids.tolist()[0]) == list(range(40))


def test_rows_of_another_session_with_the_same_number_are_passed_over(
    place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collision of 63 bits costs candidates, which brute force makes up for, and shows nothing."""
    monkeypatch.setattr(Session, "number", property(lambda _: 5))
    one, other = (MilvusBank(DIM, **place, session=name) for name in ("one", "other"))
    chunks = random_chunks(30)
    chunks.into(one)
    random_chunks(30, first=100).into(other)
    got = one.retrieve(chunks.embeddings, 3)
    assert (got.keys[:, 0, 0, 0, 0, 0] == torch.arange(30)).all()
    one.remove(range(30))
    assert other.rows.held().tolist() == list(range(30))


def test_a_session_goes_on_in_another_bank(place: dict[str, Any]) -> None:
    bank = MilvusBank(DIM, **place, session="a")
    chunks = random_chunks(30)
    chunks.into(bank)
    bank.remove([3, 29])
    before = bank.retrieve(chunks.embeddings[:5], 4)
    del bank
    again = MilvusBank.reopen(DIM, **place, session="a")
    assert again.ids.tolist() == [*range(3), *range(4, 29)]
    after = again.retrieve(chunks.embeddings[:5], 4)
    for name in ("ids", "scores", "keys", "values", "spans"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    assert random_chunks(1, first=30).into(again).tolist() == [30]


@pytest.mark.parametrize("how", ["remove", "evict", "reset"])
def test_ids_are_not_given_again_by_a_bank_that_goes_on(place: dict[str, Any], how: str) -> None:
    bank = MilvusBank(DIM, **place, session="a")
    random_chunks(6).into(bank)
    getattr(bank, how)(*{"remove": [[5]], "evict": [6], "reset": []}[how])
    del bank
    assert random_chunks(1).into(MilvusBank.reopen(DIM, **place, session="a")).tolist() == [6]


def test_a_session_that_is_there_is_not_begun_again(place: dict[str, Any]) -> None:
    bank = MilvusBank(DIM, **place, session="a")
    random_chunks(6).into(bank)
    with pytest.raises(InvalidArgumentError, match="'a' is in use by another bank of this process"):
        MilvusBank(DIM, **place, session="a")
    del bank
    with pytest.raises(InvalidArgumentError, match=r"'a' is there already, with 6 chunks.*resume=True"):
        MilvusBank(DIM, **place, session="a")
    assert len(MilvusBank(DIM, **place, session="a", resume=True)) == 6


def test_rows_of_another_session_with_the_same_number_crowd_nothing_out(
    place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "number", property(lambda _: 5))
    monkeypatch.setattr("memlong_milvus.rows.MOST_ROWS", 8)
    one, other = (MilvusBank(DIM, **place, session=name) for name in ("one", "other"))
    random_chunks(30).into(one)
    random_chunks(30, first=100).into(other)
    assert one.rows.held().tolist() == list(range(30))
    one.close()
    assert MilvusBank.reopen(DIM, **place, session="one").ids.tolist() == list(range(30))


def test_a_session_of_another_kind_is_told(place: dict[str, Any]) -> None:
    random_chunks(2).into(MilvusBank(DIM, **place, session="a", collection="c"))
    with pytest.raises(
        InvalidArgumentError, match="made with metric 'cosine', but the bank has 'inner_product'"
    ):
        MilvusBank.reopen(DIM, **place, session="a", collection="c", metric="inner_product")
    with pytest.raises(
        InvalidArgumentError, match=r"'c' at .* is for embeddings of 32 numbers, but .* dim 33"
    ):
        MilvusBank.reopen(DIM + 1, **place, session="a", collection="c")
    with pytest.raises(InvalidArgumentError, match=r"'c' at .* ranks by IP, but the bank's metric needs L2"):
        MilvusBank.reopen(DIM, **place, session="a", collection="c", metric="l2")
    with pytest.raises(
        InvalidArgumentError, match="there is no session 'a' in the collection 'memlong_33_ip'"
    ):
        MilvusBank.reopen(DIM + 1, **place, session="a")


def test_a_session_without_a_name_leaves_nothing(place: dict[str, Any], tmp_path: Path) -> None:
    bank = MilvusBank(DIM, **place, store=str(tmp_path / "kv"))
    random_chunks(6).into(bank)
    rows = bank.rows
    assert rows.held().tolist() == list(range(6))
    assert list(tmp_path.rglob("*.kv"))
    del bank
    gc.collect()
    MilvusBank(DIM, **place)
    assert not len(rows.held())
    assert not list(tmp_path.rglob("*.kv"))


@pytest.mark.slow
def test_a_process_that_ends_leaves_nothing_without_a_name(place: dict[str, Any], tmp_path: Path) -> None:
    script = (
        "from memlong.testing.harness import random_chunks\n"
        "from memlong_milvus.bank import MilvusBank\n"
        f"place = {place!r}\n"
        f"named, unnamed = MilvusBank({DIM}, **place, session='a'), MilvusBank({DIM}, **place)\n"
        "random_chunks(6).into(named), random_chunks(7).into(unnamed)\n"
        "print(unnamed.rows.session.key)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    bank = MilvusBank.reopen(DIM, **place, session="a")
    assert len(bank.rows.held()) == 6
    collection = find_collection(bank.engine, bank.collection)
    assert collection is not None
    gone = SessionRows(bank.engine, collection, Session.of_key(ran.stdout.strip()))
    assert not len(gone.held())


def test_dropping_a_session_leaves_nothing(place: dict[str, Any], tmp_path: Path) -> None:
    bank = MilvusBank(DIM, **place, session="a")
    random_chunks(6).into(bank)
    bank.drop()
    assert not len(bank.rows.held())
    assert not [path for path in (tmp_path / "memory.kv").rglob("*") if path.is_file()]
    del bank
    assert random_chunks(1).into(MilvusBank(DIM, **place, session="a")).tolist() == [0]


def test_a_loaded_snapshot_is_a_session_of_its_own(place: dict[str, Any], tmp_path: Path) -> None:
    bank = MilvusBank(DIM, **place, session="a", ef=99)
    chunks = random_chunks(10)
    chunks.into(bank)
    bank.save(tmp_path / "saved")
    loaded = MilvusBank.load(tmp_path / "saved", **place)
    assert loaded.session != bank.session
    assert loaded.options_to_save()["ef"] == 99
    loaded.remove(range(5))
    assert bank.search(chunks.embeddings[:5], 1).ids[:, 0].tolist() == list(range(5))


def test_a_snapshot_becomes_a_session_that_stays(place: dict[str, Any], tmp_path: Path) -> None:
    bank = MilvusBank(DIM)
    chunks = random_chunks(10)
    chunks.into(bank)
    bank.remove([3])
    bank.save(tmp_path / "saved")
    MilvusBank.load(tmp_path / "saved", **place, session="b").close()
    again = MilvusBank.reopen(DIM, **place, session="b")
    assert again.ids.tolist() == bank.ids.tolist()
    assert again.retrieve(chunks.embeddings[5:6], 1).keys.unique().tolist() == [5]


def test_a_session_that_is_to_last_needs_a_place_that_does(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"'a' is to last, .* give uri='/a/folder/memory.db'"):
        MilvusBank(DIM, session="a")
    with pytest.raises(InvalidArgumentError, match=r"'a' on http://localhost lasts, .* say where, as store="):
        MilvusBank(DIM, session="a", uri="http://localhost")
    with pytest.raises(InvalidArgumentError, match="resume continues a session: name it"):
        MilvusBank(DIM, resume=True)


@pytest.mark.parametrize("option", ["resume", "kv_device", "collection"])
def test_options_of_another_type_are_refused(option: str, tmp_path: Path) -> None:
    for value in (float("nan"), ["no"], 1):
        with pytest.raises(InvalidArgumentError, match=f"{option} "):
            MilvusBank(DIM, uri=str(tmp_path / "memory.db"), session="a", **{option: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="resume must be True or False, got 'no'"):
        MilvusBank(DIM, uri=str(tmp_path / "memory.db"), session="a", resume="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "x" * 257, 7])
def test_odd_names_are_refused(name: object) -> None:
    with pytest.raises(
        InvalidArgumentError,
        match=r"session must be text(, or None, got 7| of 1 to 256 characters)",
    ):
        MilvusBank(DIM, session=name)  # type: ignore[arg-type]


def test_names_may_have_any_characters(place: dict[str, Any], tmp_path: Path) -> None:
    name = "../ä/\n' or 1==1 {}%"
    random_chunks(3).into(MilvusBank(DIM, **place, session=name))
    assert MilvusBank.reopen(DIM, **place, session=name).ids.tolist() == [0, 1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"memory.db", "memory.kv"}


def test_numbers_of_sessions_are_63_bits_of_their_keys() -> None:
    sessions = [Session.of(str(number)) for number in range(1000)]
    assert len({each.number for each in sessions}) == len({each.key for each in sessions}) == 1000
    assert all(0 <= each.number < 2**63 for each in sessions)
    assert all(Session.of_key(each.key).number == each.number < LEAST_UNNAMED for each in sessions)
    assert Session.of(None).number >= LEAST_UNNAMED
    spread = np.bincount([each.partition(16) for each in sessions], minlength=16)
    assert spread.min() > 30
