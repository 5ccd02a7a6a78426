"""No command overwrites what it reads, or what is not its own; and it says so before any work."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from memlong.cli.app import make_app
from memlong.decoder.persistence.tensor_file import write_tensors
from memlong.errors import InvalidArgumentError


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch, request):
    if "works" not in request.node.name:
        monkeypatch.setattr("memlong.decoder.load_model", lambda *_, **__: pytest.fail("it works already"))


def given(story, tmp_path):
    """For each command, its input and its output options, and what else it needs."""
    maps = {"kv_source": "latent", "maps": story}
    return {
        ("perplexity", "text", "json"): {},
        ("perplexity", "maps", "json"): {"text": tmp_path / "other.txt", **maps},
        ("generate", "context", "json"): {"prompt": "word1"},
        ("needle", "filler", "json"): {},
        ("needle", "filler", "plot"): {},
    }


CASES = list(given("", Path()))


def same(path):
    return path


def another_spelling(path):
    return path.parent / "." / ".." / path.parent.name / path.name


def link(path):
    (path.parent / "link.png").symlink_to(path)
    return path.parent / "link.png"


def hard_link(path):
    os.link(path, path.parent / "hard.png")
    return path.parent / "hard.png"


@pytest.mark.parametrize("spelled", [same, another_spelling, link, hard_link])
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_what_is_read_is_not_written(invoke, story, tmp_path, case, spelled):
    command, read, written = case
    (tmp_path / "other.txt").write_text("word1")
    if written == "plot":
        story = story.rename(tmp_path / "story.png")
    before = story.read_text()
    result = invoke(command, **{**given(story, tmp_path)[case], read: story, written: spelled(story)})
    assert isinstance(result.exception, InvalidArgumentError), result.output
    assert f"--{written} and --{read} must be different files" in str(result.exception)
    assert story.read_text() == before


def fit(model_folder, story, out):
    typed = ["fit", "--model", model_folder, "--text", story, "--out", out, "--dim", 16]
    more = ["--passage-tokens", 40, "--retrieval-layers", "2-3", "--dtype", "float32"]
    return CliRunner().invoke(make_app(), list(map(str, [*typed, *more])))


@pytest.mark.parametrize("spelled", [same, another_spelling, link, hard_link])
def test_maps_do_not_overwrite_the_text(model_folder, story, spelled):
    before = story.read_text()
    assert "--out and --text must be different files" in str(
        fit(model_folder, story, spelled(story)).exception
    )
    assert story.read_text() == before


def test_two_outputs_are_two_files(invoke, tmp_path):
    (tmp_path / "a.png").touch()
    result = invoke("needle", plot=hard_link(tmp_path / "a.png"), json=tmp_path / "a.png")
    assert "--plot and --json must be different files" in str(result.exception)
    result = invoke("needle", plot=tmp_path / "new.png", json=tmp_path / "." / "new.png")
    assert "--plot and --json must be different files" in str(result.exception)


@pytest.mark.parametrize("content", ["a diary", '{"architectures": ["LlamaForCausalLM"]}', "[1]"])
def test_json_overwrites_results_alone(invoke, story, tmp_path, content):
    there = tmp_path / "there.json"
    there.write_text(content)
    result = invoke("perplexity", text=story, json=there)
    assert "already exists, and this command did not write it" in str(result.exception)
    assert there.read_text() == content


def test_maps_overwrite_maps_alone(model_folder, story, tmp_path):
    weights = model_folder / "model.safetensors"
    before = weights.read_bytes()
    assert "already exists" in str(fit(model_folder, story, weights).exception)
    assert weights.read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_maps_take_no_place_of_a_special_file(model_folder, story, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "name a regular file" in str(fit(model_folder, story, tmp_path / "pipe").exception)


def test_a_link_that_leads_to_no_folder_is_said(invoke, story, tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "none" / "out.json")
    result = invoke("perplexity", text=story, json=tmp_path / "link.json")
    assert "none' for 'out.json' does not exist" in str(result.exception)
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    result = invoke("perplexity", text=story, json=tmp_path / "loop.json")
    assert isinstance(result.exception, InvalidArgumentError)


def test_a_page_overwrites_pages_alone(story):
    before = story.read_text()
    result = CliRunner().invoke(make_app(), ["models", "--markdown", str(story)])
    assert "already exists" in str(result.exception)
    assert story.read_text() == before


def test_that_it_works_a_second_time(invoke, story, model_folder, tmp_path):
    for _ in range(2):
        assert invoke("perplexity", text=story, json=tmp_path / "out.json").exit_code == 0
        done = fit(model_folder, story, tmp_path / "maps.safetensors")
        assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out.json").read_text())["text"] == str(story)


def test_that_maps_which_cannot_be_written_works_elsewhere(model_folder, story, tmp_path, monkeypatch):
    from memlong.decoder.kv.latent import LatentMaps

    save, out = LatentMaps.save, tmp_path / "maps.safetensors"

    def full(maps, path, **options):
        if path == out:
            raise OSError(28, "No space left on device")
        save(maps, path, **options)

    monkeypatch.setattr(LatentMaps, "save", full)
    said = str(fit(model_folder, story, out).exception)
    assert "No space left on device. The maps were saved to" in said
    assert LatentMaps.load(said.rpartition(" to '")[2].partition("'")[0]).dim == 16


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_tensors_take_no_place_of_a_link_or_a_special_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is not a regular file"):
        write_tensors(tmp_path / "pipe", "maps", (0,), {"a": torch.zeros(2)})
    (tmp_path / "link").symlink_to(tmp_path / "there")
    write_tensors(tmp_path / "link", "maps", (0,), {"a": torch.zeros(2)})
    assert (tmp_path / "link").is_symlink()
    assert load_file(tmp_path / "there")["a"].shape == (2,)
