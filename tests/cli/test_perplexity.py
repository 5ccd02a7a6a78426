"""``memlong perplexity`` on a tiny random model that was saved to a folder."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from memlong import MemoryConfig, MemoryDecoder, load_model
from memlong.cli import main
from memlong.cli.app import make_app
from memlong.errors import (
    DeviceUnavailableError,
    InvalidArgumentError,
    InvalidTextError,
    MemlongError,
    StorageError,
    UnknownNameError,
)


@pytest.fixture
def run(invoke, story):
    return lambda **changes: invoke("perplexity", **{"text": story, "sink_tokens": 2, **changes})


def test_the_json_holds_what_was_asked_and_what_was_measured(run, tmp_path):
    file = tmp_path / "result.json"
    result = run(backend="faiss", backend_option="index=HNSW8", score_from=30, json=file)
    assert result.exit_code == 0, result.output
    assert "recall@3" in result.stdout
    found = json.loads(file.read_text(encoding="utf-8"))
    expected = {
        "backend": "faiss",
        "backend_options": {"index": "HNSW8"},
        "retriever": "lm",
        "kv_source": "layer",
        "retrieval_layers": [0, 1, 2, 3],
        "chunk_size": 4,
        "top_k": 3,
        "local_window": 24,
        "sink_tokens": 2,
        "segment_size": 8,
        "tokens": 120,
        "scored_tokens": 90,
        "long_range_distance": 24,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["chunks_stored"] > 20
    assert 0 < found["recall_at_k"] <= 1
    assert set(found["long_range"]) == {"tokens", "perplexity"}
    for name in ("nll", "perplexity", "tokens_per_second", "seconds", "peak_rss_bytes"):
        assert found[name] > 0
    assert {"python", "torch", "transformers", "memlong"} <= set(found["versions"])
    assert {"model", "text"} <= set(found)


def test_a_backend_that_cannot_be_had_is_told_before_the_model_is_loaded(run):
    result = run(backend="torhc")
    assert isinstance(result.exception, UnknownNameError)
    assert "loading the model" not in result.output
    assert "loading the model" in run().output


def test_recall_is_at_as_many_chunks_as_are_retrieved(run, tmp_path):
    file = tmp_path / "result.json"
    assert "recall@5" in run(top_k=5, json=file).stdout
    assert json.loads(file.read_text(encoding="utf-8"))["recall_k"] == 5


def test_where_keys_and_values_are_kept_makes_no_difference(run, tmp_path):
    plain = json.loads(run(json="-").stdout)
    tiers = json.loads(run(json="-", store=[f"disk={tmp_path}", "host=1MB"]).stdout)
    assert tiers["nll"] == plain["nll"]
    assert tiers["store"] == {"disk": str(tmp_path), "host": "1MB"}


def test_a_result_that_cannot_be_written_is_printed(run):
    result = run(json="/dev/full")
    assert isinstance(result.exception, InvalidArgumentError), result.output
    assert "The result is printed instead" in str(result.exception)
    assert json.loads(result.stdout)["backend"] == "torch"


def test_a_run_that_fails_leaves_no_file(run, tmp_path):
    run(model=tmp_path / "no-such-model.gguf", json=tmp_path / "left.json")
    assert not (tmp_path / "left.json").exists()


def test_without_memory_the_fields_about_it_are_null(run):
    result = run(backend="none", json="-")
    found = json.loads(result.stdout)
    assert found["backend"] == "none"
    assert found["retriever"] is None
    assert found["recall_at_k"] is None
    assert found["chunks_stored"] == 0


def test_the_seed_chooses_the_random_chunks(run):
    results = [json.loads(run(retriever="random", seed=seed, json="-").stdout)["nll"] for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]


def test_retrievers_are_fused_by_name(run):
    options = ["retrievers=lm,random", "weights=2,1", "candidates=9", "lm.recency-scale=50", "random.dim=8"]
    result = run(retriever="hybrid", retriever_option=options, json="-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["chunks_stored"] > 9
    result = run(retriever="hybrid", retriever_option=["retrievers=lm,random", "sentence.dim=8"])
    assert isinstance(result.exception, InvalidArgumentError)
    assert "There is no option 'sentence.dim' of retriever 'hybrid'" in str(result.exception)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text": "no-such.txt"}, InvalidTextError, "'no-such.txt' does not exist"),
        ({"backend": "fais"}, UnknownNameError, "[Dd]id you mean 'faiss'"),
        (
            {"backend_option": "index"},
            InvalidArgumentError,
            "--backend-option must be K=V",
        ),
        ({"backend": "hnswlib", "backend_option": "m=4"}, InvalidArgumentError, "no option 'm'"),
        ({"model": "no/such/folder"}, InvalidArgumentError, "'no/such/folder' could not be loaded"),
        ({"model": "no.gguf"}, InvalidArgumentError, "'no.gguf' does not exist"),
        ({"dtype": "int8"}, InvalidArgumentError, "dtype must be one of float32, .*, got 'int8'"),
        ({"device": "gpu"}, InvalidArgumentError, "device must be 'cpu', .*, got 'gpu'"),
        ({"device": "cuda:99"}, DeviceUnavailableError, "torch sees . CUDA devices"),
        ({"max_tokens": 5}, InvalidTextError, r"at least 8 tokens, one segment, got 5"),
        ({"top_k": 0}, InvalidArgumentError, "top_k must be"),
        (
            {"backend": "none", "backend_option": "index=Flat"},
            InvalidArgumentError,
            "--backend-option needs a backend",
        ),
        (
            {"store": "disc=/tmp"},
            InvalidArgumentError,
            "There is no option 'disc' of store.*Did you mean 'disk'",
        ),
        ({"store": "disk=/no/such/folder"}, StorageError, "cannot write to the folder '/no/such/folder'"),
        ({"text": "x" * 300}, InvalidTextError, "Cannot read .*: File name too long"),
        ({"model": "x" * 300}, InvalidArgumentError, "File name too long"),
        ({"json": "x" * 300}, InvalidArgumentError, "Cannot write .*: File name too long"),
        ({"retriever": "x" * 300}, UnknownNameError, "no retriever"),
        (
            {"retriever": "sentence-transformers", "retriever_option": "query_prompt=5"},
            InvalidArgumentError,
            "must be text, got 5",
        ),
        ({"retriever": "random", "retriever_option": f"dim={10**21}"}, InvalidArgumentError, "at most 65536"),
        (
            {"backend": "hnswlib", "backend_option": f"initial_capacity={10**14}"},
            InvalidArgumentError,
            "initial_capacity must be an integer from 1 to",
        ),
        ({"json": "/no/such/folder/out.json"}, InvalidArgumentError, "mkdir -p /no/such/folder"),
    ],
)
def test_bad_input_is_named_with_what_to_do(run, changes, error, message):
    result = run(**changes)
    assert isinstance(result.exception, error), result.output
    with pytest.raises(MemlongError, match=message):
        raise result.exception


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": -3}, "--max-tokens"),
        ({"long_range_distance": -3}, "--long-range-distance"),
        ({"store": "disk_budget=4"}, "disk_budget needs a folder"),
        ({"store": "disk=s3://bucket/kv"}, "must be a local path"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(run, monkeypatch, changes, message):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("memlong.decoder.load_model", load)
    result = run(**changes)
    assert not isinstance(result.exception, AssertionError)
    assert message in result.output + str(result.exception)


def test_a_folder_without_a_model_and_a_cut_off_file_are_named(run, model_folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no config.json" in str(run(model=empty).exception)
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    result = run()
    assert isinstance(result.exception, InvalidArgumentError), result.output
    assert "could not be loaded" in str(result.exception)


def test_an_error_ends_the_program_with_one_line_and_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memlong", "perplexity", "--model", "demo", "--text", "no-such.txt"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        "memlong: The text file 'no-such.txt' does not exist: check the path"
    ]


def test_a_trained_decoder_that_retrieves_for_answers_predicts_text_with_its_memory(
    story, model_folder, tmp_path
):
    sizes = {"chunk_size": 4, "top_k": 3, "local_window": 24, "segment_size": 8}
    found = {}
    for retrieve_for in ("answers", "all"):
        config = MemoryConfig(retrieve_for=retrieve_for, **sizes)
        folder = tmp_path / retrieve_for
        MemoryDecoder(*load_model(str(model_folder)), config).save_pretrained(folder)
        used = ["perplexity", "--adapter", str(folder), "--text", str(story), "--json", "-"]
        result = CliRunner().invoke(make_app(), used)
        assert result.exit_code == 0, result.output
        found[retrieve_for] = json.loads(result.stdout)["perplexity"]
        said = "retrieves for answers alone; here, text is read with retrieved chunks, too" in result.stderr
        assert said == (retrieve_for == "answers")
    assert found["answers"] == found["all"]
