"""``memlong fit`` on a tiny random model, and perplexity with what it wrote."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from memlong.cli.app import make_app
from memlong.errors import InvalidArgumentError, InvalidTextError


@pytest.fixture
def fit(model_folder, story, tmp_path):
    def run(*more, text=story):
        arguments = ["fit", "--model", model_folder, "--text", text, "--out", tmp_path / "maps.safetensors"]
        arguments += ["--passage-tokens", 20, "--dim", 16, "--dtype", "float32", *more]
        return CliRunner().invoke(make_app(), [str(each) for each in arguments])

    return run


def test_the_maps_serve_perplexity(fit, invoke, story, tmp_path):
    result = fit()
    assert result.exit_code == 0, result.output
    maps, file = tmp_path / "maps.safetensors", tmp_path / "result.json"
    assert f"{maps}: latent vectors of dimension 16 for the K-V of 4 layers" in result.stdout
    result = invoke("perplexity", text=story, kv_source="latent", maps=maps, json=file)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (found["kv_source"], found["maps"]) == ("latent", str(maps))


def test_some_layers_alone(fit, tmp_path):
    result = fit("--retrieval-layers", "1-2")
    assert "K-V of 2 layers" in result.stdout


def test_a_text_without_a_whole_passage_is_refused(fit, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("word1 word2", encoding="utf-8")
    error = fit(text=short).exception
    assert isinstance(error, InvalidTextError)
    assert "must have at least 20 tokens, one passage" in str(error)


def test_a_file_that_cannot_be_written_is_told_before_the_work(fit, tmp_path):
    error = fit("--out", tmp_path / "none" / "maps.safetensors").exception
    assert isinstance(error, InvalidArgumentError)
    assert "mkdir -p" in str(error)


def test_more_numbers_than_tokens_are_refused(fit):
    assert "give more text, or a smaller dim" in str(fit("--dim", 400).exception)
