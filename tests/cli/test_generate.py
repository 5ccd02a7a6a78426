"""``memlong generate`` on a tiny random model."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from memlong import MemoryConfig
from memlong.cli.app import make_app
from memlong.cli.memory import TRAINED
from memlong.errors import InvalidArgumentError, InvalidTextError, MemlongError


@pytest.fixture
def run(invoke, story):
    return lambda **changes: invoke(
        "generate", **{"prompt": "word1 word2", "context": story, "max_new_tokens": 9, **changes}
    )


def test_the_answer_appears_and_the_json_tells_of_it(run, tmp_path, story):
    file = tmp_path / "answer.json"
    shown = run(json=file)
    assert shown.exit_code == 0, shown.output
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["answer"]
    assert found["answer"].split() == shown.stdout.split()
    assert found["context"] == [str(story)]
    assert found["context_tokens"] == 120
    assert found["chunks_stored"] > 20
    assert found["new_tokens"] <= 9
    alone = json.loads(run(json="-").stdout)
    assert alone["answer"] == found["answer"]


def test_several_contexts_are_read_one_after_the_other(run, story):
    assert json.loads(run(context=[story, story], json="-").stdout)["context_tokens"] == 240


@pytest.mark.parametrize("changes", [{"beams": 3}, {"sample": True, "top_p": 0.9}, {"backend": "none"}])
def test_other_ways_to_generate(run, changes):
    result = run(**changes)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()


@pytest.mark.parametrize("command", ["generate", "remember", "ask", "chat", "perplexity", "needle"])
def test_every_command_with_a_memory_has_all_options_about_it(command):
    shown = CliRunner().invoke(make_app(), [command, "--help"]).stdout.split()
    for field in fields(MemoryConfig):
        option = {"backend_options": "backend_option", "retriever_options": "retriever_option"}
        name = f"--{option.get(field.name, field.name).replace('_', '-')}"
        elsewhere = {*TRAINED}
        elsewhere |= {"retrieve_every"} if command in ("remember", "perplexity", "needle") else set()
        elsewhere |= {"focus_tokens", "answer_cutoff"} if command in ("remember", "perplexity") else set()
        elsewhere |= {"retrieve_for"} if command == "perplexity" else set()
        elsewhere |= {"query_map"} if command == "remember" else set()
        assert name in shown or field.name in elsewhere


def test_the_options_about_memory_reach_it(run):
    changes = {"retrieval_layers": "1-2", "sink_tokens": 1, "top_k": 2, "position_mode": "overlaid"}
    changes |= {"query_tokens": 5, "kv_source": "shared", "memory_layer": 1, "retrieve_every": 3}
    found = json.loads(run(**changes, json="-").stdout)
    assert {name: found[name] for name in changes} == {**changes, "retrieval_layers": [1, 2]}


def test_a_stream_begins_once(run, model_folder, story):
    """A tokenizer that puts <s> before a text does so before the first, not in the middle of the stream."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save_pretrained(model_folder)
    read = json.loads(run(context=[story, story], json="-").stdout)
    assert (read["context_tokens"], read["prompt_tokens"]) == (1 + 120 + 120, 2)
    assert json.loads(run(context=[], json="-").stdout)["prompt_tokens"] == 1 + 2


def test_that_the_model_is_loading_is_said_apart_from_the_result(run):
    result = run(json="-")
    assert "loading the model" in result.stderr
    assert "loading the model" not in result.stdout


def test_a_prompt_needs_no_context(run, story):
    del story
    found = json.loads(run(context=[], json="-").stdout)
    assert found["context_tokens"] == 0
    assert found["reading_tokens_per_second"] is None


@pytest.mark.parametrize("changes", [{"max_new_tokens": 0}, {"beams": 0}, {"seed": 2**70}, {"seed": -1}])
def test_numbers_out_of_range_are_a_matter_of_usage(run, changes):
    result = run(**changes)
    assert result.exit_code == 2
    assert "Invalid value for" in result.output


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"context": "no-such.txt"}, InvalidTextError, "'no-such.txt' does not exist"),
        ({"prompt": ""}, InvalidArgumentError, "--prompt must not be empty"),
        ({"temperature": 0.5}, InvalidArgumentError, "--temperature only applies to sampling: add --sample"),
        (
            {"sample": True, "temperature": 0},
            InvalidArgumentError,
            "--temperature must be a number from 0.001 to 1000, got 0.0",
        ),
        (
            {"sample": True, "temperature": 1e-40},
            InvalidArgumentError,
            "--temperature must be a number from 0.001 to 1000, got 1e-40",
        ),
        ({"sample": True, "top_p": 5}, InvalidArgumentError, "--top-p must be a number .* to 1, got 5.0"),
        ({"prompt": "word1 \udcff"}, InvalidTextError, "--prompt must be UTF-8, got .* at character 6"),
        ({"backend_option": "store=5"}, InvalidArgumentError, "backend_options must not hold store, which"),
        ({"store": "disk"}, InvalidArgumentError, "such as --store host=1GB"),
        ({"chat": True}, InvalidArgumentError, "--chat needs a model with a chat template"),
        (
            {"retrieve_every": 9},
            InvalidArgumentError,
            r"retrieve_every must be at most segment_size \(8\)",
        ),
        ({"backend": "none", "store": "host=1GB"}, InvalidArgumentError, "--store needs a backend"),
        ({"backend": "none", "maps": "m"}, InvalidArgumentError, "--maps needs a backend"),
        ({"backend": "none", "kv_source": "shared"}, InvalidArgumentError, "--kv-source needs a backend"),
        ({"backend": "none", "backend_option": "M=8"}, InvalidArgumentError, "--backend-option needs"),
    ],
)
def test_bad_input_is_named_with_what_to_do(run, changes, error, message):
    result = run(**changes)
    assert isinstance(result.exception, error), result.output
    with pytest.raises(MemlongError, match=message):
        raise result.exception


@pytest.mark.parametrize("changes", [{"maps": "m"}, {"segment_size": 2048}])
def test_an_option_that_does_not_go_with_an_adapter_is_told_before_its_value_is_judged(run, changes):
    result = run(adapter="trained", model=None, **changes)
    assert isinstance(result.exception, InvalidArgumentError)
    message = str(result.exception)
    assert "cannot be combined with --adapter, whose memory is fixed by training" in message
    assert "--top-k, --answer-cutoff, --retrieve-for" in message
