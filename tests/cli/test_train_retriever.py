"""``memlong train-retriever`` on a tiny random model, and perplexity with the map that it wrote."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from memlong import MemoryConfig, MemoryDecoder, load_model
from memlong.cli.app import make_app
from memlong.errors import InvalidArgumentError


@pytest.fixture
def run(invoke, story, tmp_path):
    given = {"out": tmp_path / "map.safetensors", "passage_tokens": 120, "candidates": 4, "rank": 2}
    return lambda **changes: invoke("train-retriever", **{"text": story, **given, **changes})


def test_the_map_serves_perplexity(run, invoke, story, tmp_path):
    result = run()
    assert result.exit_code == 0, result.output
    path, file = tmp_path / "map.safetensors", tmp_path / "result.json"
    assert f"{path}: of what the best of 4 chunks gives over random ones" in result.stdout
    assert run().exit_code == 0  # its own file is replaced
    result = invoke("perplexity", text=story, query_map=path, json=file)
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text(encoding="utf-8"))["query_map"] == str(path)


def test_json_has_the_shares(run):
    found = json.loads(run(json="-").stdout)
    assert found["retriever"] == "lm"
    assert found["segments"] > 0 < found["held_out"]
    assert {"share", "base_share", "epochs"} < found.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "none"}, "--backend must name a backend"),
        ({"retriever": "recent"}, "compares by cosine, got RecentRetriever"),
        ({"candidates": 50}, "passages must be long enough for 50 chunks"),
    ],
)
def test_bad_input_is_told(run, changes, message):
    error = run(**changes).exception
    assert isinstance(error, InvalidArgumentError)
    assert message in str(error)


def test_other_files_are_not_overwritten(run, story, tmp_path):
    assert "must be different files" in str(run(out=story).exception)
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"something else")
    assert "already exists, and this command did not write it" in str(run(out=other).exception)
    assert other.read_bytes() == b"something else"


def test_a_map_needs_a_memory(invoke, story):
    error = invoke("perplexity", text=story, backend="none", query_map="map.safetensors").exception
    assert "--query-map needs a backend" in str(error)


def test_a_decoder_that_retrieves_for_answers_tries_chunks_for_text(story, model_folder, tmp_path):
    config = MemoryConfig(chunk_size=4, top_k=3, local_window=24, segment_size=8, retrieve_for="answers")
    MemoryDecoder(*load_model(str(model_folder)), config).save_pretrained(tmp_path / "trained")
    used = ["train-retriever", "--adapter", str(tmp_path / "trained"), "--text", str(story)]
    sizes = [
        "--passage-tokens",
        "120",
        "--candidates",
        "4",
        "--rank",
        "2",
        "--out",
        str(tmp_path / "map.safetensors"),
    ]
    result = CliRunner().invoke(make_app(), [*used, *sizes])
    assert result.exit_code == 0, result.output
    assert "retrieves for answers alone" in result.stderr
