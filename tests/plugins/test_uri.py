"""A URI may stand for a backend and its options; what is secret in one is never shown."""

from __future__ import annotations

import importlib
import sys

import pytest

from memlong.errors import InvalidArgumentError, PluginError, UnknownNameError
from memlong.plugins import PluginManager, Registry, hookimpl
from memlong.uri import digested, hide_credentials, scrubbed, without_credentials

SOURCE = """
from memlong.errors import InvalidArgumentError

def resolve(uri):
    if uri.endswith("refused"):
        raise InvalidArgumentError(f"{uri} has no database")
    if uri.endswith("nothing"):
        return None
    if uri.endswith("again"):
        return uri, {}
    if uri.endswith("numbered"):
        return "torch", {3: 4}
    if uri.endswith("exit"):
        raise SystemExit(uri)
    if uri.endswith("unprintable"):
        raise Unprintable
    return "torch", {"max_chunks": int(uri.rpartition("=")[2])}  # a ValueError for what is no number

class Thing: ...

class Unprintable(BaseException):
    def __str__(self):
        raise RuntimeError
"""


class Plugin:
    def __init__(self, target):
        self.target = target

    @hookimpl
    def memlong_register_uri_schemes(self, register):
        register("acme+db", self.target)


@pytest.fixture
def registry(site, request) -> Registry:
    (site / "fake_uri_target.py").write_text(SOURCE)
    importlib.invalidate_caches()
    yield with_target("fake_uri_target:resolve")
    sys.modules.pop("fake_uri_target", None)


def with_target(target):
    manager = PluginManager()
    manager.register(Plugin(target), name="acme")
    return Registry(manager)


def test_a_uri_gives_the_backend_and_its_options(registry):
    bank = registry.create_bank("acme+db://host/?max_chunks=7", 4, metric="l2")
    assert (type(bank).__name__, bank.metric) == ("TorchBank", "l2")
    assert registry.resolve("ACME+DB://host/?max_chunks=7") == ("torch", {"max_chunks": 7})


def test_a_saved_bank_can_be_loaded_by_a_uri(registry, tmp_path):
    registry.create_bank("torch", 4).save(tmp_path / "bank")
    assert type(registry.load_bank(tmp_path / "bank", "acme+db://host/?max_chunks=7")).__name__ == "TorchBank"


def test_a_plain_name_stays_what_it_is(registry):
    assert registry.resolve("torch", metric="l2") == ("torch", {"metric": "l2"})


def test_an_option_is_said_once(registry):
    with pytest.raises(
        InvalidArgumentError, match=r"'max_chunks' both in the backend's URI and as an option"
    ):
        registry.create_bank("acme+db://host/?max_chunks=7", 4, max_chunks=8)


def test_an_unknown_scheme_is_named_and_nothing_secret_is_shown(registry):
    with pytest.raises(UnknownNameError, match=r"no URI scheme 'acme\+dc'\. Did you mean") as caught:
        registry.create_bank("acme+dc://me:secret@host", 4)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("end", ["nothing", "again", "numbered"])
def test_a_function_that_returns_something_else_is_its_authors_fault(registry, end):
    with pytest.raises(PluginError, match="must return a pair of a backend's name and a dict"):
        registry.create_bank(f"acme+db://{end}", 4)


def test_a_function_that_raises_something_else_is_its_authors_fault(registry):
    with pytest.raises(
        PluginError, match=r"raises ValueError for 'acme\+db://\*\*\*@host/\?max_chunks=many'"
    ):
        registry.create_bank("acme+db://me:secret@host/?max_chunks=many", 4)


@pytest.mark.parametrize(("end", "kind"), [("exit", "SystemExit"), ("unprintable", "Unprintable")])
def test_a_function_that_raises_what_is_no_exception_ends_nothing(registry, end, kind):
    with pytest.raises(PluginError, match=rf"raises {kind} for 'acme\+db://\*\*\*@host/{end}'"):
        registry.create_bank(f"acme+db://me:secret@host/{end}", 4)


def test_a_plugins_own_error_is_told_without_what_is_secret(registry):
    with pytest.raises(
        InvalidArgumentError, match=r"^acme\+db://\*\*\*@host/refused has no database$"
    ) as caught:
        registry.create_bank("acme+db://me:secret@host/refused", 4)
    assert caught.value.__suppress_context__  # a traceback would show the plugin's own text


@pytest.mark.parametrize("name", ["me:secret@host", "acme+db:/me:secret@host"])
def test_what_was_to_be_a_uri_is_shown_without_what_may_be_secret(registry, name):
    with pytest.raises(UnknownNameError, match=r"no backend '\*\*\*@host'") as caught:
        registry.create_bank(name, 4)
    assert "secret" not in str(caught.value)


def test_a_scheme_leads_to_a_function(registry):
    with pytest.raises(PluginError, match="must be a function, got type"):
        with_target("fake_uri_target:Thing").create_bank("acme+db://host", 4)


@pytest.mark.parametrize("name", ["Acme", "my_db", "db:", "1db", ""])
def test_a_scheme_is_one_that_a_uri_can_have(registry, name):
    class Odd:
        @hookimpl
        def memlong_register_uri_schemes(self, register):
            register(name, "a:b")

    with pytest.raises(PluginError, match="name of a URI scheme must be"):
        registry.manager.register(Odd(), name="odd")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("torch", "torch"),
        ("milvus://host:19530/db?session=a", "milvus://host:19530/db?session=a"),
        ("milvus://me:se@cret@host/db", "milvus://***@host/db"),
        ("milvus://token@host", "milvus://***@host"),
        (
            "milvus://host?token=abc&session=b&Password=c#d",
            "milvus://host?token=***&session=b&Password=***#***",
        ),
        ("s3://bucket?aws_secret_key=abc", "s3://bucket?aws_secret_key=***"),
        ("db://host?username=a&pwd=b&auth=c", "db://host?username=***&pwd=***&auth=***"),
        ("db://me:p/w@host/db", "db://***@host/db"),
        ("db://me:p?w@host/db", "db://***@host/db"),
        ("db://me:p#w@host/db", "db://***@host/db"),
        ("db://me:hunter2", "db://***"),
        ("db://me:48151", "db://me:***"),
        ("db://host/x?sig=a&X-Amz-Signature=b&X-Amz-Credential=c", None),
        ("db://host/x?pass=a&jwt=b&c", None),
        ("db://host/x?store=s3://me:secret@bucket/f", "db://***@bucket/f"),
        ("me:secret@host", "***@host"),
        ("see db://me:secret@host:443/x, please", "see db://***@host:443/x, please"),
    ],
)
def test_a_uri_is_shown_without_its_credentials(uri, shown):
    found = without_credentials(uri)
    if shown is None:
        names = [pair.partition("=")[0] for pair in uri.partition("?")[2].split("&") if "=" in pair]
        assert found.partition("?")[2].removesuffix("&***").split("&") == [f"{name}=***" for name in names]
    else:
        assert found == shown


def test_options_are_shown_without_credentials():
    options = {"token": "a", "api_key": "b", "uri": "http://u:p@h", "ef": 3, "index": "HNSW32"}
    shown = {"token": "***", "api_key": "***", "uri": "http://***@h", "ef": 3, "index": "HNSW32"}
    assert hide_credentials(options) == shown


@pytest.mark.parametrize(
    "name",
    ["pass", "dsn", "connection_string", "jwt", "sig", "access_key_id", "pin", "anything_else", "bearer"],
)
def test_text_is_shown_only_where_it_is_known_to_be_harmless(name):
    assert hide_credentials({name: "s3cret", "nested": {name: ["s3cret"]}, "list": [{name: "s3cret"}]}) == {
        name: "***",
        "nested": {name: ["***"]},
        "list": [{name: "***"}],
    }


def test_numbers_are_shown_unless_their_name_says_otherwise():
    options = {"pin": 1234, "password": 5678, "beam": 4, "ratio": 0.5, "on": True, "off": None}
    assert hide_credentials(options) == {**options, "pin": "***", "password": "***"}
    assert hide_credentials({"auth": {"mode": "x", "port": 7}}) == {"auth": {"mode": "***", "port": "***"}}


def test_a_plugins_own_words_about_a_uri_hold_no_part_of_its_secrets():
    said = scrubbed("port 'hunter2' of me:hunter2 is no number; sig abc", "db://me:hunter2@h?sig=abc")
    assert said == "port '***' of *** is no number; sig ***"


def test_options_can_be_compared_without_being_known():
    one, other = digested({"api_key": "a", "style": "x"}), digested({"api_key": "b", "style": "x"})
    assert one == other != digested({"api_key": "a", "style": "y"})
    assert one["api_key"] == "***"
