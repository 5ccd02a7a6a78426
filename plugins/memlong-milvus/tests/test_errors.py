"""Errors say what is wrong, and show no secrets."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
from milvus_server import Server
from pymilvus import MilvusClient

from memlong.errors import InvalidArgumentError
from memlong.testing.harness import DIM, random_chunks
from memlong_milvus.bank import MilvusBank
from memlong_milvus.errors import BackendError

NOBODY = "http://127.0.0.1:9"


def test_a_server_that_is_not_there_is_told_soon() -> None:
    began = time.monotonic()
    with pytest.raises(
        BackendError, match=r"at http://127.0.0.1:9 did not be|be connected to in 2 attempts"
    ) as caught:
        MilvusBank(DIM, uri=NOBODY, attempts=2)
    assert time.monotonic() - began < 5
    assert "Is the server there" in str(caught.value)


def test_an_error_shows_no_secret(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(BackendError) as caught:
        MilvusBank(DIM, uri="http://me:hush-hush@127.0.0.1:9", attempts=2)
    shown = [str(caught.value), repr(caught.value), caplog.text, *capfd.readouterr()]
    assert not any("hush" in each for each in shown)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uri": "memory.sqlite"}, "uri must be the path of a file that ends in .db"),
        ({"uri": 7}, "uri must be text"),
        (
            {"consistency": "session"},
            "consistency must be one of 'strong', 'bounded', 'eventually', got 'session'",
        ),
        ({"staleness": -1}, "staleness must be a number from 0 to .*, got -1"),
        ({"timeout": 0}, "timeout must be a number above 0 .*, got 0"),
        ({"attempts": 0}, "attempts must be an integer from 1 to 100, got 0"),
        ({"readers": 2.5}, "readers must be an integer from 1 to 256, got 2.5"),
        ({"M": 1}, "M must be an integer from 2 to 2048, got 1"),
        ({"ef": 10**9}, "ef must be an integer from 1 to 32768"),
        ({"partitions": 0}, "partitions must be an integer from 1 to 1024, got 0"),
        ({"collection": "../x"}, r"collection must have up to 255 letters, digits"),
    ],
)
def test_odd_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        MilvusBank(DIM, **options)


def test_a_collection_that_is_not_memlongs_is_left_alone(tmp_path: Path) -> None:
    bank = MilvusBank(DIM, uri=str(tmp_path / "memory.db"))
    client = bank.engine.client
    client.create_collection("other", dimension=DIM)
    with pytest.raises(InvalidArgumentError, match=r"'other' at .* has the fields .* not made by memlong"):
        MilvusBank(DIM, uri=str(tmp_path / "memory.db"), collection="other")


@pytest.mark.server
def test_who_may_not_is_told_and_who_may_leaves_no_trace_of_the_password(
    secured_server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    bare = secured_server.uri
    MilvusClient(bare, token="root:Milvus").update_password(
        "root", "Milvus", "hush-hush", reset_connection=False
    )
    caplog.clear()
    for options in ({}, {"token": "root:not-it"}):
        with pytest.raises(BackendError, match=r"refused to .*MEMLONG_MILVUS_TOKEN") as caught:
            MilvusBank(DIM, uri=bare, attempts=3, **options)
        assert "not-it" not in str(caught.value)
    for way in ("token", "uri", "environment"):
        if way == "environment":
            monkeypatch.setenv("MEMLONG_MILVUS_TOKEN", "root:hush-hush")
        options = {
            "token": {"uri": bare, "token": "root:hush-hush"},
            "uri": {"uri": bare.replace("://", "://root:hush-hush@")},
            "environment": {"uri": bare},
        }[way]
        bank = MilvusBank(DIM, **options)
        chunks = random_chunks(5)
        chunks.into(bank)
        assert bank.retrieve(chunks.embeddings, 1).ids[:, 0].tolist() == list(range(5))
        bank.save(tmp_path / way)
        shown = [repr(bank), bank.uri, repr(bank.engine), str(bank.options_to_save())]
        shown += [path.read_text(errors="replace") for path in (tmp_path / way).iterdir()]
        assert not any("hush" in each for each in shown)
    assert "not-it" not in caplog.text
    assert "hush" not in caplog.text
