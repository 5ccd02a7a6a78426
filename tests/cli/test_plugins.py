"""``memlong plugins`` says what was found, what it brought and what went wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memlong.cli.app import make_app

GOOD = """
from memlong.plugins.hookspecs import hookimpl

@hookimpl
def memlong_register_backends(register):
    register("acme", "acme_bank:Bank", requires=("no_such_library",), install="pip install 'acme[memory]'")
"""


def put(site: Path, name: str, source: str) -> None:
    info = site / f"{name}_memory-2.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-memory\nVersion: 2.1\n")
    (info / "entry_points.txt").write_text(f"[memlong]\n{name} = {name}_memory\n")
    (site / f"{name}_memory.py").write_text(source)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with one plugin that works and one that does not."""
    put(tmp_path / "site", "acme", GOOD)
    put(tmp_path / "site", "broken", "raise RuntimeError('no key')")
    return tmp_path / "site"


def memlong(*arguments: str, site: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MEMLONG_")}
    return subprocess.run(
        [sys.executable, "-c", "from memlong.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=kept | {"PYTHONPATH": str(site), "COLUMNS": "200"} | environ,
    )


def test_json_holds_every_plugin_and_nothing_else(site):
    result = memlong("plugins", "--json", site=site)
    assert (result.returncode, result.stderr) == (0, "")
    plugins = {plugin["name"]: plugin for plugin in json.loads(result.stdout)["plugins"]}
    assert plugins["acme"] == {
        "name": "acme",
        "origin": "acme-memory 2.1",
        "module": "acme_memory",
        "status": "loaded",
        "distribution": "acme-memory",
        "reason": "",
        "backends": ["acme"],
        "retrievers": [],
        "eviction_policies": [],
        "uri_schemes": [],
        "conflicts": [],
    }
    assert (plugins["broken"]["status"], plugins["broken"]["reason"]) == ("failed", "RuntimeError: no key")
    assert {plugins[name]["origin"] for name in ("memlong_torch", "memlong_faiss")} == {"built-in"}


def test_the_table_says_why_a_plugin_is_not_loaded(site):
    result = memlong("plugins", site=site, MEMLONG_DISABLE_PLUGINS="memlong_faiss,typo")
    assert result.returncode == 0
    assert "acme-memory 2.1" in result.stdout
    assert "broken: RuntimeError: no key" in result.stdout
    assert "memlong_faiss: disabled by MEMLONG_DISABLE_PLUGINS='memlong_faiss,typo'" in result.stdout
    assert "typo: MEMLONG_DISABLE_PLUGINS names it, but no such plugin is installed" in result.stdout


LOUD = """
import atexit, ctypes, logging, os, subprocess, sys
from memlong.plugins.hookspecs import hookimpl

def shout(where):
    print("print", where, "\\x1b[2J")
    sys.stdout.buffer.write(b"buffer\\n")
    sys.__stdout__.write("dunder\\n")
    os.write(1, b"descriptor\\n")
    ctypes.CDLL(None).puts(b"from C")
    subprocess.run(["echo", "child"])
    sys.stdout.reconfigure(errors="replace")
    sys.stdout.flush()

shout("import")
atexit.register(shout, "exit")
logging.basicConfig(stream=sys.stdout, level=0)

@hookimpl
def memlong_register_backends(register):
    shout("hook")
    logging.info("logged")
    register("loud", "loud_bank:Bank")
"""
LOUD_BANK = """
from loud_memory import shout
from memlong_torch.index import TorchIndex
shout("late")

class Bank(TorchIndex):
    def search(self, queries, k):
        shout("search")
        return super().search(queries, k)
"""


@pytest.fixture
def loud(site: Path) -> Path:
    """A plugin that prints in every way and at every time."""
    put(site, "loud", LOUD)
    (site / "loud_bank.py").write_text(LOUD_BANK)
    return site


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize("command", ["plugins", "backends"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_plugin_that_prints_does_not_spoil_the_answer(loud, command, unbuffered):
    result = memlong(command, "--json", site=loud, PYTHONUNBUFFERED=unbuffered)
    assert result.returncode == 0, result.stderr
    assert "loud" in json.dumps(json.loads(result.stdout))
    said = ["print import \\x1b[2J", "print hook", "print exit", "INFO:root:logged"]
    said += ["buffer", "dunder", "descriptor", "from C", "child"]
    assert not [each for each in said if each not in result.stderr]
    assert "\nprint hook" not in memlong(command, site=loud).stdout


@pytest.mark.parametrize(
    "harm", ["sys.stdout.close()", "os.close(1)", "sys.stdout = None", "sys.stdout = open(os.devnull, 'w')"]
)
def test_a_plugin_that_takes_the_output_away_takes_no_answer(loud, harm):
    put(loud, "a_thief", f"import os, sys\n{harm}")
    result = memlong("plugins", "--json", site=loud)
    plugins = {each["name"]: each for each in json.loads(result.stdout)["plugins"]}
    assert plugins["acme"]["status"] == "loaded"
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_a_backend_that_prints_while_it_works_does_not_spoil_the_answer(loud, arguments, story):
    typed = map(str, arguments("perplexity", text=story, backend="loud", json="-"))
    result = memlong(*typed, site=loud)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["backend"] == "loud"
    assert {"late", "search"} <= set(result.stderr.split())


@pytest.mark.slow
def test_a_backend_that_ends_the_program_is_told(site, arguments, story):
    put(site, "quits", LOUD.replace("loud", "quits"))
    bank = "class Bank(TorchIndex):\n    def __init__(self, *_, **__): exit(0)\n"
    (site / "quits_bank.py").write_text(f"from memlong_torch.index import TorchIndex\n{bank}")
    result = memlong(*map(str, arguments("perplexity", text=story, backend="quits", json="-")), site=site)
    assert (result.returncode, result.stdout) == (1, "")
    assert "memlong: A plugin or library exited the program (exit status 0)" in result.stderr


def test_plugins_of_very_many_names_fill_no_screen(site):
    put(site, "many", GOOD.replace('register("acme"', 'for i in range(1000): register(f"n{i}"'))
    said = " ".join(memlong("plugins", site=site).stdout.split())
    assert "n39 and 960 more" in said
    assert len(said) < 5_000
    for number in range(2, 5):
        loop = f'for i in range(1000): register(f"m{number}.{{i}}"'
        put(site, f"many{number}", GOOD.replace('register("acme"', loop))
    listed = memlong("backends", site=site)
    assert "more; --json prints all" in listed.stdout
    assert len(json.loads(memlong("backends", "--json", site=site).stdout)["backends"]) > 4_000


@pytest.mark.parametrize("command", ["plugins", "backends"])
def test_what_others_wrote_does_not_command_the_terminal(site, command):
    put(site, "evil", "raise RuntimeError('\\x1b]0;title\\x07 \\x1b[2J \\u202e \\ud800 two\\nlines')")
    (site / "evil_memory-2.1.dist-info" / "METADATA").write_text("Name: evil-memory\nVersion: 2.1\x1b[31m\n")
    result = memlong(command, site=site, MEMLONG_DISABLE_PLUGINS="typo\x1b[2J")
    assert result.returncode == 0, result.stderr
    assert not {"\x1b", "\x07", "\u202e"} & set(result.stdout + result.stderr)
    assert "RuntimeError: \\x1b]0;title\\x07 \\x1b[2J \\u202e \\ud800 two\n  lines" in result.stdout
    assert "typo\\x1b[2J" in result.stdout


def test_the_table_can_be_read_on_a_narrow_terminal(site):
    said = memlong("plugins", site=site, COLUMNS="80").stdout
    assert {"memlong_retrievers", "sentence-transformers,", "retrieval_frequency", "acme-memory"} <= set(
        said.split()
    )


def test_the_table_shows_conflicts(site):
    put(site, "zeta", GOOD)
    result = memlong("plugins", site=site)
    assert "acme: backend 'acme' is also registered by plugin 'zeta' (zeta-memory 2.1)" in result.stdout


def test_backends_show_how_to_get_one_and_what_is_not_loaded(site):
    result = memlong("backends", site=site)
    assert result.returncode == 0
    assert "acme needs no_such_library: pip install 'acme[memory]'" in result.stdout
    assert "broken (broken-memory 2.1): RuntimeError: no key" in result.stdout


def test_backends_show_who_claims_a_name(site):
    put(site, "zeta", GOOD)
    result = memlong("backends", "--json", site=site)
    contested = [spec for spec in json.loads(result.stdout)["backends"] if spec["name"] == "acme"]
    assert [(spec["plugin"], spec["status"]) for spec in contested] == [
        ("acme", "conflict"),
        ("zeta", "conflict"),
    ]
    assert "acme: MEMLONG_DISABLE_PLUGINS=zeta" in memlong("backends", site=site).stdout


def test_the_help_holds_examples():
    result = CliRunner().invoke(make_app(), ["plugins", "--help"])
    assert result.exit_code == 0
    assert "\n    memlong plugins --json\n" in result.stdout
