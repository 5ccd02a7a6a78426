"""Who may import whom, read from the source: imports inside functions and for types count as well."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BELOW = {
    "errors": set(),
    "versions": set(),
    "settings": {"errors"},
    "uri": {"errors"},
    "bank": {"versions", "settings", "uri", "errors"},
    "plugins": {"settings", "uri", "bank", "errors"},
    "decoder": {"versions", "settings", "uri", "plugins", "bank", "errors"},
    "training": {
        "settings",
        "evaluation",
        "decoder",
        "plugins",
        "bank",
        "errors",
    },  # it weighs tokens as they are measured
    "evaluation": {"versions", "settings", "decoder", "plugins", "bank", "errors"},
    "testing": {
        "settings",
        "decoder",
        "plugins",
        "bank",
        "errors",
    },  # a plugin's backend is proven by a model that reads with it
    "corpus": {"evaluation", "decoder", "plugins", "bank", "errors"},
    "lm_eval": {"settings", "evaluation", "decoder", "bank", "errors"},
    "architectures": {"settings", "decoder", "plugins", "bank", "errors"},
    "cli": {
        "versions",
        "settings",
        "uri",
        "architectures",
        "lm_eval",
        "training",
        "corpus",
        "evaluation",
        "decoder",
        "plugins",
        "bank",
        "errors",
    },
    "__main__": {"cli"},
    "__init__": {"settings", "training", "evaluation", "decoder", "plugins", "bank", "errors"},
}
OPEN_TO_BACKENDS = ("memlong.bank", "memlong.errors", "memlong.plugins.hookspecs", "memlong.settings")
RUN_CODE_WHEN_READ = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(source: str, package: str = "") -> set[str]:
    """Every module that ``source`` imports, for ``from a import b`` both ``a`` and ``a.b``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.Call) and _imports_by_text(node):
            found.add(node.args[0].value)
    return found


def _imports_by_text(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    by_text = name in ("import_module", "__import__")
    return by_text and bool(call.args) and isinstance(getattr(call.args[0], "value", None), str)


@cache
def imported_by(path: Path) -> set[str]:
    base = ROOT / "backends" if ROOT / "backends" in path.parents else ROOT
    return imported(path.read_text(encoding="utf-8"), ".".join(path.relative_to(base).parent.parts))


def uses_torch_load(source: str) -> bool:
    tree = ast.parse(source)
    return "torch.load" in imported(source) or any(
        isinstance(node, ast.Attribute) and node.attr == "load" and getattr(node.value, "id", "") == "torch"
        for node in ast.walk(tree)
    )


def within(module: str, *packages: str) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def roots(path: Path) -> set[str]:
    return {module.partition(".")[0] for module in imported_by(path)}


def parts_of_memlong(modules: set[str]) -> Iterator[str]:
    """The parts of memlong among ``modules``; what is no part is a name of ``memlong`` itself."""
    for module in modules:
        if within(module, "memlong") and module != "memlong":
            part = module.split(".")[1]
            yield part if part in BELOW else "memlong"


def offenders(paths: Iterable[Path], judged: Callable[[Path], object]) -> dict[str, object]:
    """What was found wrong, by the file that it was found in."""
    found = {str(path.relative_to(ROOT)): judged(path) for path in paths}
    assert found, "there is nothing to look at"
    return {name: wrong for name, wrong in found.items() if wrong}


def test_imports_go_downward_only():
    def wrong(path):
        part = path.relative_to(ROOT / "memlong").parts[0].removesuffix(".py")
        if part not in BELOW:
            return f"{part} is new: say in this test what it may import"
        return set(parts_of_memlong(imported_by(path))) - {part} - BELOW[part]

    assert not offenders(files("memlong"), wrong)


def test_a_backend_knows_the_bank_the_errors_and_the_hook_marker():
    def wrong(path):
        own = path.relative_to(ROOT / "backends").parts[0]
        reached = {
            module
            for module in imported_by(path)
            if within(module, "memlong") and module != "memlong.plugins"
        }
        closed = {module for module in reached if not within(module, *OPEN_TO_BACKENDS)}
        return closed | {root for root in roots(path) if root.startswith("memlong_")} - {own}

    assert not offenders(files("backends"), wrong)


def test_registering_a_backend_imports_no_library():
    def wrong(path):
        ours = {module for module in imported_by(path) if within(module, "memlong")}
        libraries = roots(path) - {"memlong", *sys.stdlib_module_names}  # which belong into its bank module
        return libraries | {module for module in ours if not within(module, "memlong.plugins")}

    assert not offenders(ROOT.glob("backends/*/__init__.py"), wrong)


def test_transformers_stays_in_the_decoder_and_in_training():
    def may(path):
        makes_models = path == ROOT / "memlong/testing/models.py"
        return makes_models or {"decoder", "training", "architectures", "lm_eval"} & set(
            path.relative_to(ROOT).parts[1:-1]
        )

    others = [path for path in files("memlong", "backends") if not may(path)]
    assert not offenders(others, lambda path: {"transformers", "sentence_transformers"} & roots(path))


def test_no_index_library_is_imported_by_memlong_itself():
    def wrong(path):
        backends = {root for root in roots(path) if root.startswith("memlong_")}
        return backends | {"faiss", "hnswlib", "usearch", "pymilvus"} & roots(path)

    assert not offenders(files("memlong"), wrong)


def test_nothing_reads_files_that_can_run_code():
    def wrong(path):
        loads = {"torch.load"} if uses_torch_load(path.read_text(encoding="utf-8")) else set()
        return RUN_CODE_WHEN_READ & roots(path) | loads

    assert not offenders(files("memlong", "backends", "plugins", "examples", "bench"), wrong)


@pytest.mark.parametrize(
    ("statement", "module"),
    [
        ("import a.b", "a.b"),
        ("from a import b", "a.b"),
        ("from .c import d", "memlong.bank.c.d"),
        ("from ..plugins import d", "memlong.plugins.d"),
        ("from . import d", "memlong.bank.d"),
        ("def f():\n    import a", "a"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a", "a"),
        ("import importlib\nimportlib.import_module('a.b')", "a.b"),
    ],
)
def test_every_way_to_import_is_seen(statement, module):
    assert module in imported(statement, "memlong.bank")


@pytest.mark.parametrize(
    "source", ["import torch\ntorch.load('x')", "from torch import load", "import torch\nread = torch.load"]
)
def test_every_way_to_torch_load_is_seen(source):
    assert uses_torch_load(source)


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running ``code``."""
    report = "import json, sys; sys.stderr.write('\\n' + json.dumps(sorted(sys.modules)))"
    script = f"import atexit\natexit.register(lambda: exec({report!r}, {{}}))\n{code}"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {name.partition(".")[0] for name in json.loads(result.stderr.splitlines()[-1])}


INDEXES_AND_MODELS = {"transformers", "sentence_transformers", "faiss", "hnswlib"}


def test_importing_memlong_brings_no_backend_and_no_transformers():
    modules = modules_after("import memlong")
    assert not INDEXES_AND_MODELS & modules
    assert not {name for name in modules if name.startswith("memlong_")}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plugins"], ["backends"]])
def test_the_command_line_is_quick_to_start(arguments):
    code = f"import sys; sys.argv[1:] = {arguments!r}\nfrom memlong.cli import main\nmain()"
    assert not (INDEXES_AND_MODELS | {"torch"}) & modules_after(code)
