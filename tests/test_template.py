"""The plugin to copy stays small, and one that `memlong plugins new` writes works outside this repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "plugins" / "memlong-usearch"


def run(*command: object, cwd: Path, **environ: str) -> str:
    """Run a command in a folder, and return what it printed; fail with all of it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEMLONG_", "PYTHON"))}
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=kept | {"PYTHONDONTWRITEBYTECODE": "1"} | environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_the_template_is_short():
    lines = [
        line for path in TEMPLATE.glob("memlong_usearch/**/*.py") for line in path.read_text().splitlines()
    ]
    assert 50 < len(lines) < 200


def test_the_template_imports_its_library_only_for_a_bank(tmp_path):
    code = (
        "import sys; from memlong import Registry; assert Registry().backend('usearch').missing() == ();"
        "assert not {'usearch', 'torch', 'numpy'} & set(sys.modules)"
    )
    run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=os.pathsep.join(sys.path))


class Place:
    """A folder with memlong and plugins installed into it, and a Python that sees these and no checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.site = folder, folder / "site"
        # Libraries come from where they are. "-S" passes over .pth files, which lead to editable installs.
        libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        self.path = os.pathsep.join([str(self.site), *libraries])

    def install(self, project: Path) -> None:
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", self.site]
        run(sys.executable, "-m", "pip", "install", *options, project, cwd=self.folder)

    def python(self, *arguments: object, cwd: Path | None = None, **environ: str) -> str:
        return run(sys.executable, "-S", *arguments, cwd=cwd or self.folder, PYTHONPATH=self.path, **environ)

    def memlong(self, *arguments: object) -> str:
        return self.python("-c", "from memlong.cli import main; main()", *arguments)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place where memlong is installed, and a plugin that it wrote there itself."""
    place = Place(tmp_path_factory.mktemp("place"))
    place.install(ROOT)
    place.memlong("plugins", "new", "my-index")
    place.install(place.folder / "memlong-my-index")
    return place


@pytest.mark.slow
def test_nothing_of_the_checkout_is_on_the_path(place):
    code = (
        "import json, sys, memlong, memlong_torch;"
        "print(json.dumps([memlong.__file__, memlong_torch.__file__, *sys.path]))"
    )
    ours, torchs, *path = map(Path, json.loads(place.python("-c", code)))
    assert ours.is_relative_to(place.site)
    assert torchs.is_relative_to(place.site)
    assert not {ROOT, ROOT / "backends", TEMPLATE} & {each.resolve() for each in path if each.name}


@pytest.mark.slow
def test_a_plugin_that_was_written_is_listed(place):
    plugins = {each["name"]: each for each in json.loads(place.memlong("plugins", "--json"))["plugins"]}
    assert (plugins["my-index"]["status"], plugins["my-index"]["backends"]) == ("loaded", ["my-index"])
    assert plugins["my-index"]["origin"] == "memlong-my-index 0.1.0"
    backends = {each["name"]: each for each in json.loads(place.memlong("backends", "--json"))["backends"]}
    assert (backends["my-index"]["status"], backends["my-index"]["plugin"]) == ("available", "my-index")


@pytest.mark.slow
def test_a_plugin_that_was_written_passes_its_tests_untouched(place):
    """Those of the plugin, and one of each kind of the bank's; all of them are run where the docs are tested."""
    chosen = "TestPlugin or recall or damaged or fresh or side_by_side"
    run = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    said = place.python(*run, cwd=place.folder / "memlong-my-index")
    assert int(said.splitlines()[-1].partition(" passed")[0]) > 10
    assert "warning" not in said


@pytest.mark.slow
def test_a_plugin_that_was_written_is_clean(place):
    package = place.folder / "memlong-my-index"
    run(
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--select=E,F,I,UP,B",
        "--line-length=120",
        cwd=package,
    )
    run(sys.executable, "-m", "ruff", "format", "--isolated", "--line-length=110", "--check", cwd=package)
