"""A model that says no numbers gets no result; one that says numbers beyond all bounds gets JSON all the same."""

from __future__ import annotations

import json

import pytest
import torch

from memlong.errors import InvalidArgumentError, MemlongError
from memlong.training import fit_latent_maps
from memlong.training.latent import _Watch

PLAIN = {"backend": "none", "chunk_size": 4}


@pytest.fixture
def broken(llama, model_folder):
    """Let the model's last layer be multiplied by a number."""

    def make(factor):
        with torch.no_grad():
            llama.lm_head.weight.mul_(factor)
        llama.save_pretrained(model_folder)

    return make


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("perplexity", {}),
        ("generate", {"prompt": "word1", "max_new_tokens": 3}),
        ("generate", {"prompt": "word1", "max_new_tokens": 3, "sample": True}),
        ("generate", {"prompt": "word1", "max_new_tokens": 3, "beams": 2}),
        ("needle", {"lengths": 100, "depths": 0}),
    ],
)
def test_no_result_is_made_of_what_is_no_number(broken, invoke, story, command, options):
    broken(float("nan"))
    given = {"text": story} if command == "perplexity" else {}
    result = invoke(command, **PLAIN, **given, **options)
    assert isinstance(result.exception, MemlongError), result.output
    assert "logits must be numbers" in str(result.exception)


def test_maps_are_made_of_numbers(llama, text, monkeypatch):
    states = _Watch.states
    monkeypatch.setattr(_Watch, "states", lambda watch: states(watch) * float("inf"))
    with pytest.raises(InvalidArgumentError, match=r"Keys and values of .* must be finite"):
        fit_latent_maps(llama, [text(100)], dim=16)


def test_json_has_null_where_it_has_no_number(broken, invoke, story):
    broken(1e6)
    result = invoke("perplexity", text=story, json="-", **PLAIN)
    found = json.loads(result.stdout, parse_constant=lambda said: pytest.fail(said))
    assert found["perplexity"] is None
    assert found["nll"] > 1e4
