"""``memlong plugins new`` writes a whole plugin or nothing, and only under names that nobody has."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memlong.cli.app import make_app
from memlong.cli.new_plugin.names import PluginNames
from memlong.errors import InvalidArgumentError

REGISTERS = """
from memlong.plugins.hookspecs import hookimpl

@hookimpl
def memlong_register_backends(register):
    register("acme-index", "acme_bank:Bank")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder that commands run in."""
    monkeypatch.delenv("MEMLONG_PLUGINS", raising=False)
    monkeypatch.delenv("MEMLONG_DISABLE_PLUGINS", raising=False)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def acme(tmp_path, monkeypatch):
    """An installed plugin: distribution memlong-acme, plugin corp, backend acme-index."""
    site = tmp_path / "site"
    info = site / "memlong_acme-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: memlong-acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[memlong]\ncorp = corp_memory\n")
    (site / "corp_memory.py").write_text(REGISTERS)
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    yield site
    sys.modules.pop("corp_memory", None)


def new(*arguments):
    return CliRunner().invoke(make_app(), ["plugins", "new", *map(str, arguments)])


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def refused(*arguments) -> str:
    result = new(*arguments)
    assert isinstance(result.exception, InvalidArgumentError), result.output
    return str(result.exception)


def test_a_whole_package_is_written(folder):
    assert new("my-index").exit_code == 0
    assert [path.name for path in folder.iterdir()] == ["memlong-my-index"]
    assert written(folder / "memlong-my-index") == {
        "README.md",
        "pyproject.toml",
        "memlong_my_index/__init__.py",
        "memlong_my_index/index.py",
        "memlong_my_index/py.typed",
        "tests/conftest.py",
        "tests/test_index.py",
    }


@pytest.mark.parametrize("name", ["my-index", "my.odd_index2"])
def test_every_file_bears_the_names(folder, name):
    names = PluginNames(name)
    assert new(name, "--out", "mine").exit_code == 0
    project = tomllib.loads((folder / "mine/pyproject.toml").read_text())["project"]
    assert project["name"] == names.distribution
    assert project["entry-points"]["memlong"] == {name: names.package}
    assert project["dependencies"][0] == "memlong>=0.1,<0.2"
    init, bank = (
        (folder / "mine" / names.package / file).read_text() for file in ("__init__.py", "index.py")
    )
    assert f'"{name}",\n        "{names.package}.index:{names.index_class}"' in init
    assert f"class {names.index_class}(Index[Options]):" in bank
    for path in written(folder):
        text = Path(path).read_text()
        assert "$" not in text
        assert not path.endswith(".py") or compile(text, path, "exec")


@pytest.mark.parametrize(
    ("name", "distribution", "package", "index_class"),
    [
        ("my-index", "memlong-my-index", "memlong_my_index", "MyIndex"),
        ("a", "memlong-a", "memlong_a", "AIndex"),
        ("pq_4.bit", "memlong-pq-4-bit", "memlong_pq_4_bit", "Pq4BitIndex"),
    ],
)
def test_all_names_follow_from_the_one(name, distribution, package, index_class):
    names = PluginNames(name)
    assert (names.distribution, names.package, names.index_class) == (distribution, package, index_class)


@pytest.mark.parametrize(
    "name",
    ["", "My-Index", "4d", "my index", "-x", "x-", "a--b", "a/b", "../a", "a\nb", "é", "1", "x\x1b[31m"],
)
def test_what_names_neither_a_backend_nor_a_package_is_refused(folder, name):
    # After "--", or a dash in front would make it an option.
    message = refused("--", name)
    assert repr(name) in message
    assert PluginNames(re.search("Try '([^']*)'", message)[1])
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["memlong", "memlong-index", "memlong_class", "memlong.4d"])
def test_the_prefix_is_not_said_twice(name):
    message = refused(name)
    assert "must not start with 'memlong'" in message
    assert PluginNames(re.search("Try '([^']*)'", message)[1])


@pytest.mark.parametrize("name", ["class", "import", "none", "true"])
def test_words_of_python_are_refused(name):
    message = refused(name)
    assert f"must not be a Python keyword, got '{name}'" in message
    assert PluginNames(re.search("such as '([^']*)'", message)[1])


def test_a_name_too_long_for_files_is_refused():
    assert new("a" * 60).exit_code == 0
    assert "at most 60 characters, as files are named after it, got 61" in refused("a" * 61)


@pytest.mark.parametrize("name", ["torch", "faiss", "hnswlib", "retrievers"])
def test_names_of_built_in_plugins_are_taken(folder, name):
    message = refused(name)
    assert f"'memlong_{name}' (built-in)" in message
    assert f"choose another name, such as 'my-{name}'" in message
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("acme-index", "a backend of"),
        ("acme_index", "a backend of"),
        ("corp", "the installed"),
        ("acme", "the installed"),
    ],
)
def test_names_of_installed_plugins_are_taken(acme, name, why):
    message = refused(name)
    assert f"NAME '{name}' is taken by {why} plugin 'corp' (memlong-acme 1.0)" in message


def test_the_name_of_a_plugin_that_is_switched_off_is_taken(monkeypatch):
    monkeypatch.setenv("MEMLONG_DISABLE_PLUGINS", "memlong_torch")
    assert "the installed plugin 'memlong_torch' (built-in)" in refused("torch")


def test_a_name_that_only_the_environment_holds_is_free(monkeypatch):
    monkeypatch.setenv("MEMLONG_PLUGINS", "my-index")
    assert new("my-index").exit_code == 0


def test_a_package_that_python_finds_is_not_shadowed(tmp_path, monkeypatch):
    (tmp_path / "site/memlong_thing").mkdir(parents=True)
    (tmp_path / "site/memlong_thing/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert "taken by an installed Python package memlong_thing" in refused("thing")


def test_what_is_there_is_left_alone(folder):
    (folder / "memlong-my-index").mkdir()
    (folder / "memlong-my-index/notes.txt").write_text("mine")
    assert "'memlong-my-index' is not empty" in refused("my-index")
    assert written(folder) == {"memlong-my-index/notes.txt"}
    (folder / "file").write_text("mine")
    assert "'file' is not a folder" in refused("my-index", "--out", "file")
    assert (folder / "file").read_text() == "mine"


def test_a_folder_of_which_the_parent_is_missing_is_refused(folder):
    assert f"the folder '{folder / 'no'}' does not exist. Create it first" in refused(
        "my-index", "--out", "no/where"
    )
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("out", ["empty", ".", "new", "empty/../new"])
def test_the_folder_may_be_empty_or_new(folder, out):
    (folder / "empty").mkdir()
    if out == ".":
        (folder / "empty").rmdir()
    assert new("my-index", "--out", out).exit_code == 0
    assert sorted(path.name for path in (folder / out).iterdir()) == [
        "README.md",
        "memlong_my_index",
        "pyproject.toml",
        "tests",
    ]


@pytest.mark.parametrize("raised", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("there", "method", "calls"),
    [
        (False, "write_text", 1),
        (False, "write_text", 4),
        (False, "rename", 1),
        (True, "write_text", 4),
        (True, "rename", 3),
    ],
)
def test_nothing_half_written_is_left(folder, monkeypatch, raised, there, method, calls):
    if there:
        (folder / "mine").mkdir()
    made, whole = [], getattr(Path, method)

    def failing(self, *arguments, **options):
        made.append(self)
        if len(made) == calls:
            raise raised
        return whole(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, failing)
        result = new("my-index", "--out", "mine")
    assert len(made) >= calls
    if isinstance(raised, OSError):
        assert "Cannot write 'mine': No space left on device" in str(result.exception)
    else:
        assert result.exit_code == 130
    assert sorted(path.name for path in folder.rglob("*")) == ["mine"] * there
    assert new("my-index", "--out", "mine").exit_code == 0


@pytest.mark.parametrize(
    ("out", "install", "tests"),
    [
        (None, "'./memlong-my-index[test]'", "./memlong-my-index"),
        ("with space", "'./with space[test]'", "'./with space'"),
        ("-x", "'./-x[test]'", "./-x"),
        (".", "'.[test]'", "."),
    ],
)
def test_what_to_do_next_is_said(out, install, tests):
    result = new("my-index", *([] if out is None else [f"--out={out}"]))
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert lines[lines.index("Next") + 1 :][:3] == [
        f"pip install -e {install}",
        f"pytest {tests}",
        "memlong backends",
    ]
    assert lines[-1].endswith("memlong_my_index/index.py")
    assert Path(lines[-1]).is_file()


def test_json_goes_with_the_list_alone(folder):
    result = CliRunner().invoke(make_app(), ["plugins", "--json", "new", "my-index"])
    assert (result.exit_code, list(folder.iterdir())) == (2, [])


def test_the_help_holds_examples():
    result = CliRunner().invoke(make_app(), ["plugins", "new", "--help"])
    assert result.exit_code == 0
    assert "\n    memlong plugins new my-index\n" in result.stdout
