"""What a URI says, and what of it is shown."""

from __future__ import annotations

import pytest

from memlong.errors import InvalidArgumentError
from memlong.uri import without_credentials
from memlong_milvus.uri import parse_address, resolve


@pytest.mark.parametrize(
    ("uri", "options"),
    [
        ("milvus://localhost:19530", {"uri": "http://localhost:19530"}),
        ("milvus+https://host/mine", {"uri": "https://host", "database": "mine"}),
        ("milvus://me:p%40ss@host:1/db", {"uri": "http://host:1", "token": "me:p@ss", "database": "db"}),
        ("milvus://[::1]:19530", {"uri": "http://[::1]:19530"}),
        ("milvus+lite:///a/b.db", {"uri": "/a/b.db"}),
        ("MILVUS+Lite:///a@b/c%23.db?ef=1", {"uri": "/a@b/c#.db", "ef": 1}),
        (
            "milvus+lite:///a/b.db?session=007&resume=true&ef=128&staleness=2.5",
            {"uri": "/a/b.db", "session": "007", "resume": True, "ef": 128, "staleness": 2.5},
        ),
        (
            "milvus://host?consistency=strong&store=s3://bucket/x&collection=mine",
            {"uri": "http://host", "consistency": "strong", "store": "s3://bucket/x", "collection": "mine"},
        ),
    ],
)
def test_a_uri_becomes_options(uri: str, options: dict[str, object]) -> None:
    assert resolve(uri) == ("milvus", options)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("redis://host", "is no URI of a Milvus; expected milvus://host"),
        ("milvus://", "names no host"),
        ("milvus+lite://a/b.db", "names no local file"),
        ("milvus+lite:///a/b", r"names no local file that ends in \.db"),
        ("milvus://host?sesion=x", "option 'sesion' that does not exist; there are: collection, session"),
        ("milvus://host?ef=1&ef=2", "gives 'ef' twice"),
        ("milvus://host:port", "with a number as port"),
    ],
)
def test_what_is_no_such_uri_is_told(uri: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        resolve(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "milvus://me:secret@host?nope=1",
        "milvus://me:secret@host:x",
        "milvus://me:p@secret@host?nope=1",
        "mil://me:secret@h",
        "milvus://me:p?secret@host",
        "milvus://me:1/secret@host?ef=1",
        "milvus://me:1#secret@host",
    ],
)
def test_errors_about_a_uri_do_not_show_its_password(uri: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        resolve(uri)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_an_address_shows_no_token() -> None:
    address = parse_address("https://me:secret@host:19530/db")
    assert (address.uri, address.token, address.database) == ("https://host:19530", "me:secret", "db")
    assert "secret" not in repr(address)
    assert without_credentials("see https://me:secret@host/x") == "see https://***@host/x"


@pytest.mark.parametrize("uri", ["memory.sqlite", "ftp://host", "http://"])
def test_what_is_no_address_is_told(uri: str) -> None:
    with pytest.raises(InvalidArgumentError, match="uri must be"):
        parse_address(uri)
