"""Which places are local folders, and which URIs are refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from memlong.bank import objects_at
from memlong.bank.sessions.folders import absolute
from memlong.errors import InvalidArgumentError
from memlong.uri import local_path


@pytest.mark.parametrize(
    ("place", "path"),
    [
        ("kv", "kv"),
        ("/data/kv", "/data/kv"),
        ("file:///data/kv", "/data/kv"),
        ("FILE:///data/kv", "/data/kv"),
        ("file:/data/kv", "/data/kv"),
        ("file://localhost/data/kv", "/data/kv"),
        ("file:///data/a%20b", "/data/a b"),
        ("/data/a%20b", "/data/a%20b"),
        ("./s3:/kv", "./s3:/kv"),
        ("/data/s3:/kv", "/data/s3:/kv"),
        ("file:///data/s3:/kv", "/data/s3:/kv"),
        ("s3:", "s3:"),
        ("C:/data", "C:/data"),
        ("s3://bucket/kv", None),
        ("simplecache::s3://bucket/kv", None),
    ],
)
def test_a_place_is_a_path_or_a_uri(place, path):
    assert local_path(place) == path


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3:/bucket", "must have two slashes .*write s3://"),
        (Path("s3://bucket"), "must have two slashes .*write s3://.*Path joins slashes"),
        ("file:rel", "must have an absolute path"),
        ("File:localhost/data", "must have an absolute path"),
        ("file://rel", "must have an absolute path"),
        ("file://other/data", "must have an absolute path"),
        ("file://", "must have an absolute path"),
        ("file:///", "must have an absolute path"),
    ],
)
def test_a_uri_that_is_not_whole_is_refused(place, message):
    with pytest.raises(InvalidArgumentError, match=message):
        objects_at(place)


@pytest.mark.parametrize("place", ["file://me:sesame@host/kv", "s3:/me:sesame@bucket"])
def test_a_refused_uri_shows_no_secret(place):
    with pytest.raises(InvalidArgumentError) as told:
        local_path(place)
    assert "sesame" not in str(told.value)


def test_objects_are_in_the_folder_that_a_place_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (
        "./s3:/a",
        f"{tmp_path}/s3:/b",
        Path(tmp_path, "s3:", "c"),
        f"FILE://{tmp_path}/a%20b",
        Path("d"),
    ):
        objects_at(place).write("x", b"1")
    found = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("x")}
    assert found == {"s3:/a", "s3:/b", "s3:/c", "a b", "d"}


def test_a_uri_is_not_taken_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("s3://bucket/kv", Path("s3://bucket/kv"), "file:///data", "file:data"):
        with pytest.raises(InvalidArgumentError, match="must be a local path, got the URI"):
            absolute(folder)
    assert absolute("./s3:/kv") == tmp_path / "s3:" / "kv"
