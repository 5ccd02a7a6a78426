"""``memlong models``: whether memory attaches to a model, from its configuration alone."""

from __future__ import annotations

import json

import pytest
from transformers import GPT2Config, LlamaConfig
from typer.testing import CliRunner

from memlong.architectures import Architecture, Trial
from memlong.cli.app import make_app
from memlong.cli.models import line, page
from memlong.errors import InvalidArgumentError


def memlong(*arguments):
    return CliRunner().invoke(make_app(), ["models", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path):
    LlamaConfig(num_hidden_layers=4, max_position_embeddings=4096).save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_without_weights_is_told(folder):
    told = " ".join(memlong(folder).stdout.split())
    assert "class LlamaForCausalLM memory attaches layers 4: full attention retrieval layers 0-3" in told
    assert "stored per token keys and values bytes per token 131,072 (float32), 65,536 (bfloat16)" in told
    assert "local window 384 to 4,091 tokens" in told


def test_a_configuration_file_is_told_as_json(folder):
    told = json.loads(memlong(folder / "config.json", "--json").stdout)
    assert told["attaches"]
    assert told["retrieval_layers"] == [0, 1, 2, 3]
    assert told["token_bytes"]["bfloat16"] == 2 * 4 * 32 * 128 * 2
    assert told["max_positions"] == 4096


def test_a_model_without_rotary_positions_says_why(tmp_path):
    GPT2Config(n_layer=2).save_pretrained(tmp_path)
    result = memlong(tmp_path)
    assert result.exit_code == 0
    assert "does not attach" in result.stdout
    assert "rotary positions" in result.stdout


def test_a_model_type_is_tried():
    told = json.loads(memlong("gemma3_text", "--json").stdout)
    assert (told["works"], told["refused"], told["fails"]) == (1, 0, 0)
    (found,) = told["architectures"]
    assert found["class"] == "Gemma3ForCausalLM"
    assert found["layers"] == "full attention, sliding window"


def test_a_name_that_is_nothing_is_explained(tmp_path):
    result = memlong(tmp_path / "nothing.json")
    assert isinstance(result.exception, InvalidArgumentError)
    assert "nothing.json" in str(result.exception)


def test_the_page_is_of_all_model_types(tmp_path):
    result = memlong("llama", "--markdown", tmp_path / "page.md")
    assert isinstance(result.exception, InvalidArgumentError)
    assert not (tmp_path / "page.md").exists()


def test_the_page_counts_and_escapes():
    trials = [
        Trial(Architecture("a", "A"), "works", "", "full attention", "keys and values"),
        Trial(
            Architecture("b", "B"),
            "refused",
            "Memory cannot be attached to B: a <mask> | more. Supported are others",
        ),
    ]
    written = page(trials)
    assert "Of 2 architectures" in written
    assert "1 work, 1 are refused, 0 fail." in written
    assert "\n| a | A | works | full attention | keys and values |  |\n" in written
    assert line(trials[1]) == r"| b | B | refused |  |  | a \<mask> \| more |"


def test_the_help_holds_examples():
    assert "\n    memlong models qwen3_next\n" in memlong("--help").stdout
