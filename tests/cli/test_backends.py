"""``memlong backends`` and what all commands share: version, help, exit codes, errors."""

from __future__ import annotations

import json
import signal
import sys

import pytest
from typer.testing import CliRunner

from memlong.cli import app as application
from memlong.cli import main
from memlong.cli.app import make_app
from memlong.errors import MissingDependencyError


@pytest.fixture(autouse=True)
def _default_environment(monkeypatch):
    monkeypatch.delenv("MEMLONG_PLUGINS", raising=False)
    monkeypatch.delenv("MEMLONG_DISABLE_PLUGINS", raising=False)


def memlong(*arguments: str):
    return CliRunner().invoke(make_app(), arguments)


def test_the_built_in_backends_are_listed():
    result = memlong("backends")
    assert result.exit_code == 0
    assert {"torch", "faiss", "hnswlib"} <= {line.partition(" ")[0] for line in result.stdout.splitlines()}


def test_json_says_what_each_backend_needs():
    result = memlong("backends", "--json")
    backends = {spec["name"]: spec for spec in json.loads(result.stdout)["backends"]}
    assert backends["torch"]["status"] == "available"
    assert backends["faiss"]["requires"] == ["faiss"]
    assert backends["faiss"]["install"]
    assert set(backends["torch"]) == {
        "kind",
        "name",
        "target",
        "plugin",
        "requires",
        "install",
        "description",
        "status",
        "missing",
    }


def test_a_library_that_is_not_installed_shows_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "hnswlib", None)
    backends = {spec["name"]: spec for spec in json.loads(memlong("backends", "--json").stdout)["backends"]}
    assert (backends["hnswlib"]["status"], backends["hnswlib"]["missing"]) == ("not installed", ["hnswlib"])
    assert f"hnswlib needs hnswlib: {backends['hnswlib']['install']}" in memlong("backends").stdout


def test_the_help_holds_examples():
    result = memlong("backends", "--help")
    assert result.exit_code == 0
    assert "\n    memlong backends --json\n" in result.stdout


@pytest.mark.parametrize("arguments", [["nonsense"], ["backends", "--nonsense"], []])
def test_wrong_usage_exits_with_two(arguments):
    assert memlong(*arguments).exit_code == 2


def test_version():
    assert memlong("--version").stdout.startswith("memlong 0.")


def run_main(monkeypatch, raised: BaseException) -> int:
    def command() -> None:
        raise raised

    monkeypatch.setattr(application, "_COMMANDS", (command,))
    monkeypatch.setattr(sys, "argv", ["memlong", "command"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def test_an_error_of_ours_is_one_message_and_exit_code_one(monkeypatch, capsys):
    assert (
        run_main(monkeypatch, MissingDependencyError("needs 'faiss'.\nInstall it with: pip install x")) == 1
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "memlong: needs 'faiss'.\nInstall it with: pip install x\n"


def test_an_interrupt_is_told(monkeypatch, capsys):
    assert run_main(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.strip() == "memlong: interrupted"


@pytest.mark.parametrize("other", [RecursionError("too deep"), MissingDependencyError("it does not import")])
def test_an_interrupt_that_a_library_makes_another_error_of_is_told(monkeypatch, capsys, other):
    def command() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise other from None

    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(application, "_COMMANDS", (command,))
    monkeypatch.setattr(sys, "argv", ["memlong", "command"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "memlong: interrupted"


def test_any_other_error_is_not_hidden(monkeypatch):
    def command() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(application, "_COMMANDS", (command,))
    monkeypatch.setattr(sys, "argv", ["memlong", "command"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(ZeroDivisionError):
        main()
