"""``memlong heads`` on a tiny random model, and perplexity with the heads it prints."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from memlong.cli.app import make_app
from memlong.errors import InvalidArgumentError, InvalidTextError


@pytest.fixture
def heads(model_folder, story):
    def run(*more, text=story):
        arguments = ["heads", "--model", model_folder, "--text", text, "--dtype", "float32"]
        arguments += ["--passage-tokens", 60, "--local-window", 20, *more]
        return CliRunner().invoke(make_app(), [str(each) for each in arguments])

    return run


def test_the_heads_serve_perplexity(heads, invoke, story, tmp_path):
    found = heads()
    assert found.exit_code == 0, found.output
    named, file = found.stdout.strip(), tmp_path / "result.json"
    assert sum(len(part.split(":")[1].split("+")) for part in named.split(",")) == 4  # half of 4 layers' 2
    result = invoke("perplexity", text=story, retrieval_heads=named, json=file)
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text(encoding="utf-8"))["retrieval_heads"] == named


def test_json_has_the_scores(heads):
    found = json.loads(heads("--share", 0.25, "--json", "-").stdout)
    scores = {
        (layer, head): each for layer, some in found["scores"].items() for head, each in enumerate(some)
    }
    best = sorted(scores, key=scores.get)[-2:]
    assert {f"{layer}:{head}" for layer, head in best} == set(found["retrieval_heads"].split(","))


def test_whole_layers_serve_as_retrieval_layers(heads, invoke, story, tmp_path):
    found = json.loads(heads("--layers", 2, "--json", "-").stdout)
    best = sorted(found["scores"], key=lambda layer: sum(found["scores"][layer]))[-2:]
    assert found["retrieval_layers"] == ",".join(sorted(best, key=int))
    assert "retrieval_heads" not in found
    assert heads("--layers", 2).stdout.strip() == found["retrieval_layers"]
    file = tmp_path / "result.json"
    invoke("perplexity", text=story, retrieval_layers=found["retrieval_layers"], json=file)
    used = json.loads(file.read_text(encoding="utf-8"))["retrieval_layers"]
    assert used == [int(each) for each in found["retrieval_layers"].split(",")]


def test_bad_input_is_told(heads, tmp_path):
    assert "--layers chooses whole layers" in str(heads("--layers", 2, "--share", 0.25).exception)
    assert "--layers must be at most 4" in str(heads("--layers", 9).exception)
    assert "--share must be above 0 and at most 1, got 0" in str(heads("--share", 0).exception)
    short = tmp_path / "short.txt"
    short.write_text("word1 word2", encoding="utf-8")
    assert isinstance(heads(text=short).exception, InvalidTextError)
    error = heads("--local-window", 60).exception
    assert isinstance(error, InvalidArgumentError)
    assert "--passage-tokens must be more than 64" in str(error)
