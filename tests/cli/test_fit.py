"""``memlong fit`` on a tiny random model, and perplexity with what it wrote."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from memlong.cli.app import make_app
from memlong.cli.passages import passages_of_facts
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


def test_one_layers_kv_as_the_vector(fit, tmp_path):
    assert "dim must be left out with memory_layer" in str(fit("--memory-layer", 1).exception)


def test_short_passages_have_no_room_for_facts(fit):
    assert "--passage-tokens must be at least 512 with --facts" in str(fit("--facts", 1).exception)


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text, **options):
        return SimpleNamespace(input_ids=[ord(letter) for letter in text])

    def decode(self, ids):
        return "".join(map(chr, ids))

    def build_inputs_with_special_tokens(self, ids):
        return ids


class LongLetters(Letters):
    """Of four tokens each."""

    def __call__(self, text, **options):
        return SimpleNamespace(input_ids=[ord(letter) for letter in text for _ in range(4)])


def test_passages_that_hold_no_fact_are_told_by_the_option():
    words = " ".join(f"word{'abcdefghij'[n // 10]}{'abcdefghij'[n % 10]}" for n in range(100))
    filler = [torch.tensor([ord(letter) for letter in words * 4])]
    with pytest.raises(InvalidArgumentError, match=r"--passage-tokens must be larger.* got 512.*Try 1024"):
        passages_of_facts(LongLetters(), filler, passages=1, passage_tokens=512, seed=0)


def test_passages_of_facts_hold_names_and_numbers():
    words = " ".join(f"word{'abcdefghij'[n // 10]}{'abcdefghij'[n % 10]}" for n in range(100))
    filler = [torch.tensor([ord(letter) for letter in words * 4])]
    found = passages_of_facts(Letters(), filler, passages=2, passage_tokens=1024, seed=0)
    assert [tuple(each.shape) for each in found] == [(1, 1024)] * 6
    assert all(any(chr(token).isdigit() for token in each[0].tolist()) for each in found[2:])
