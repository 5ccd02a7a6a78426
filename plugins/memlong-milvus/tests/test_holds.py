"""Whose a session is at a time, and that failures let go of it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from pymilvus import MilvusException

from memlong.errors import InvalidArgumentError, MemlongError
from memlong.testing.harness import DIM, random_chunks
from memlong_milvus.bank import MilvusBank
from memlong_milvus.errors import BackendError
from memlong_milvus.rows import SessionRows


@pytest.fixture
def place(tmp_path: Path) -> dict[str, Any]:
    """A lasting local file."""
    return {"uri": str(tmp_path / "memory.db")}


def _unavailable(*_: object, **__: object) -> None:
    raise MilvusException(code=1, message="service unavailable")


def test_who_is_refused_a_session_may_go_on_with_it_at_once(place: dict[str, Any]) -> None:
    random_chunks(6).into(MilvusBank(DIM, **place, session="a"))
    try:
        MilvusBank(DIM, **place, session="a")
    except InvalidArgumentError:  # which holds the frames of the refused bank
        bank = MilvusBank(DIM, **place, session="a", resume=True)
    assert len(bank) == 6


def test_a_bank_that_failed_lets_go_of_its_session(
    place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the error had it, and the error holds no frame."""
    bank = MilvusBank(DIM, **place, session="a", attempts=2)
    chunks = random_chunks(6)
    chunks.into(bank)
    client, gone = bank.engine.client, weakref.ref(bank)
    gc.collect()
    gc.disable()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(client, "search", _unavailable)
            with pytest.raises(BackendError, match="did not search in 2 attempts"):
                bank.search(chunks.embeddings, 1)
        del bank
        assert gone() is None
    finally:
        gc.enable()


def test_a_bank_in_a_cycle_does_not_keep_its_session(place: dict[str, Any]) -> None:
    bank = MilvusBank(DIM, **place, session="a")
    random_chunks(6).into(bank)
    bank.itself = bank  # type: ignore[attr-defined]
    gc.disable()
    try:
        del bank
        assert len(MilvusBank.reopen(DIM, **place, session="a")) == 6
    finally:
        gc.enable()


def test_a_closed_bank_leaves_its_session_to_others(place: dict[str, Any]) -> None:
    with MilvusBank(DIM, **place, session="a") as bank:
        chunks = random_chunks(6)
        chunks.into(bank)
    with pytest.raises(InvalidArgumentError, match=r"session 'a' is closed.*MilvusBank\.reopen"):
        bank.search(chunks.embeddings, 1)
    again = MilvusBank.reopen(DIM, **place, session="a")
    bank.close()
    assert again.search(chunks.embeddings, 1).ids[:, 0].tolist() == list(range(6))
    with pytest.raises(InvalidArgumentError, match="in use"):
        MilvusBank.reopen(DIM, **place, session="a")


def test_a_closed_bank_without_a_name_leaves_nothing(place: dict[str, Any], tmp_path: Path) -> None:
    with MilvusBank(DIM, **place, store=str(tmp_path / "kv")) as bank:
        random_chunks(6).into(bank)
        other = MilvusBank(DIM, **place)
        rows = SessionRows(other.engine, bank.rows.collection, bank.rows.session)
        assert rows.held().tolist() == list(range(6))
    assert not len(rows.held())
    assert not list(tmp_path.rglob("*.kv"))


def test_what_is_added_after_a_failure_is_in_milvus_with_all_else(
    place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is there already is not written again."""
    bank = MilvusBank(DIM, **place, session="a", attempts=1)
    random_chunks(6).into(bank)
    client, written = bank.engine.client, []
    with monkeypatch.context() as patch:
        patch.setattr(client, "upsert", _unavailable)
        with pytest.raises(BackendError):
            random_chunks(3, seed=1, first=6).into(bank)
    assert bank.next_id == 6
    upsert = client.upsert
    monkeypatch.setattr(
        client,
        "upsert",
        lambda *given, data, **options: (
            written.extend(row["chunk"] for row in data),
            upsert(*given, data=data, **options),
        ),
    )
    random_chunks(2, seed=2, first=6).into(bank)
    assert set(written) == {6, 7}
    assert bank.rows.held().tolist() == list(range(8))


def test_a_closed_bank_changes_nothing_of_the_session_that_another_has(place: dict[str, Any]) -> None:
    bank = MilvusBank(DIM, **place, session="a")
    random_chunks(6).into(bank)
    bank.close()
    again = MilvusBank.reopen(DIM, **place, session="a")
    for change in (
        bank.reset,
        bank.drop,
        lambda: bank.remove([0]),
        lambda: random_chunks(1, first=6).into(bank),
    ):
        with pytest.raises(MemlongError, match="is closed"):
            change()
    assert len(again.fetch(again.ids).ids) == 6
    again.close()
    assert len(MilvusBank.reopen(DIM, **place, session="a")) == 6


def test_a_relative_path_means_the_same_file_after_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    monkeypatch.chdir(first)
    with MilvusBank(DIM, uri="memory.db", session="a") as bank:
        random_chunks(3).into(bank)
    monkeypatch.chdir(second)
    with MilvusBank.reopen(DIM, uri=str(first / "memory.db"), session="a") as bank:
        assert len(bank) == 3
    assert not list(second.iterdir())


def test_a_bank_that_was_refused_lets_go_of_the_file(place: dict[str, Any]) -> None:
    with MilvusBank(DIM, **place, session="a", collection="one") as bank:
        hub = bank.engine.hub
    with pytest.raises(InvalidArgumentError) as refused:  # which holds the frames
        MilvusBank(DIM + 1, **place, session="b", collection="one")
    assert refused.value
    assert hub.client is None
