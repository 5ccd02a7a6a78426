"""What is built is what is meant to be installed, and the files around it say what is true of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import memlong

ROOT = Path(__file__).parent.parent
FOLDERS = {path.name: path for path in [ROOT / "memlong", *(ROOT / "backends").glob("memlong_*")]}
IS_ARCHIVE = (ROOT / "PKG-INFO").exists()  # and no checkout
WEIGHTS = ".safetensors"
MEGABYTE = 2**20


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source archive, and the wheel that is built from it."""
    pytest.importorskip("hatchling", reason="it builds the package")
    folder = tmp_path_factory.mktemp("built")
    build(ROOT, "sdist", folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "source", filter="data")
    build(next((folder / "source").iterdir()), "wheel", folder)
    return folder


def build(source: Path, target: str, folder: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", folder]
    subprocess.run(command, cwd=source, check=True, capture_output=True)


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def source(built) -> Path:
    return next((built / "source").iterdir())


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


# --- what is built ----------------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_library_and_its_backends_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in FOLDERS.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "memlong/py.typed" in names
    assert any(name.endswith(".template") for name in names)  # of `memlong plugins new`
    assert "memlong/lm_eval/tasks/ruler_local/ruler_local.yaml" in names
    assert wheel.stat().st_size < MEGABYTE


def test_the_source_archive_holds_what_the_tests_read_but_not_the_weights(built, source):
    assert IS_ARCHIVE or list((ROOT / "examples").rglob(f"*{WEIGHTS}"))
    assert not list(source.rglob(f"*{WEIGHTS}"))
    for name in ("tests", "docs", "bench", "plugins", "examples"):
        wanted = {
            path.relative_to(ROOT) for path in (ROOT / name).rglob("*.*") if path.suffix in {".py", ".md"}
        }
        assert wanted == {
            path.relative_to(source) for path in (source / name).rglob("*") if path.suffix in {".py", ".md"}
        }
    for name in ("Makefile", "mkdocs.yml", "constraints.txt", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"):
        assert (source / name).is_file()
    assert next(built.glob("*.tar.gz")).stat().st_size < 3 * MEGABYTE


def test_the_wheel_says_what_it_is(wheel):
    said = metadata(wheel)
    assert said["Name"] == "memlong"
    assert said["Version"] == memlong.__version__
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload(decode=True).decode().strip() == read("README.md").strip()


def test_what_the_wheel_installs_runs_by_itself(wheel, tmp_path):
    shutil.unpack_archive(wheel, tmp_path, "zip")
    code = "import memlong.cli; print(memlong.__file__); memlong.cli.main()"
    command = [sys.executable, "-c", code, "backends"]
    settings = {**os.environ, "PYTHONPATH": str(tmp_path), "MEMLONG_PLUGINS": ""}
    said = subprocess.run(
        command, cwd=tmp_path, env=settings, check=True, capture_output=True, text=True
    ).stdout
    assert said.startswith(str(tmp_path))
    assert re.findall(r"^(torch|faiss|hnswlib) ", said, flags=re.MULTILINE) == ["torch", "faiss", "hnswlib"]


# --- what is said of it -----------------------------------------------------------------------------------------------


def test_the_version_stands_in_one_place():
    assert tomllib.loads(read("pyproject.toml"))["project"]["dynamic"] == ["version"]
    assert f"\nversion: {memlong.__version__}\n" in read("CITATION.cff")
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), flags=re.MULTILINE)[1] == memlong.__version__


def test_contributors_are_told_where_things_live():
    named = set(re.findall(r"`(memlong/\w+)/`", read("CONTRIBUTING.md")))
    assert named == {f"memlong/{path.parent.name}" for path in (ROOT / "memlong").glob("*/__init__.py")}


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", read(page)):
        assert "://" in link or (ROOT / link).exists(), link


def in_checkout(name: str) -> str:
    if IS_ARCHIVE:
        pytest.skip("a source archive leaves it out")
    return read(name)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", ".github/workflows/ci.yml"])
def test_make_targets_exist(name):
    targets = set(re.findall(r"(?:`|\n| run: )make ([a-z][\w-]*)", in_checkout(name)))
    assert "lint" in targets
    assert targets <= set(re.findall(r"^([a-z][\w-]*):", read("Makefile"), flags=re.MULTILINE))


def test_hosted_ci_tests_the_versions_that_the_script_knows():
    named = re.findall(r"\{setting: \"?([\w.-]+)\"?, python:", in_checkout(".github/workflows/ci.yml"))
    known = re.findall(r"Setting\(\"([\d.]+)\"(, lowest=True)?\)", read("tests/versions.py"))
    assert named == [f"{python}-lowest" if lowest else python for python, lowest in known]


def test_hooks_before_a_commit_run_what_lint_runs():
    hooks = re.findall(r"entry: \.venv/bin/(.+)", in_checkout(".pre-commit-config.yaml"))
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", read("Makefile"), flags=re.MULTILINE)[1]
    assert [hook.replace(" --force-exclude", "") for hook in hooks] == re.findall(r"\$\(BIN\)/(.+)", recipe)


@pytest.mark.parametrize("name", ["bug", "unsupported-model", "new-backend"])
def test_issue_forms_are_of_the_form_that_github_takes(name):
    yaml = pytest.importorskip("yaml")
    form = yaml.safe_load(in_checkout(f".github/ISSUE_TEMPLATE/{name}.yml"))
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert len({field["id"] for field in fields}) == len(fields)
    for field in fields:
        assert set(field) <= {"type", "id", "attributes", "validations"}
        assert field["attributes"]["label"]
