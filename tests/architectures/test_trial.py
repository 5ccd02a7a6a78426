"""A trial sees what is wrong with a model, or with what memory makes of it."""

from __future__ import annotations

import pytest
import torch

from memlong import MemoryDecoder
from memlong.architectures import Architecture, tiny_model_of, try_architecture
from memlong.architectures import trial as trials
from memlong.errors import UnsupportedModelError

LLAMA = Architecture("llama", "LlamaForCausalLM")


def raising(error):
    def raises(*_, **__):
        raise error

    return raises


def test_memory_that_is_right_works():
    trial = try_architecture(LLAMA)
    assert (trial.status, trial.reason) == ("works", "")
    assert (trial.layers, trial.stored) == ("full attention", "keys and values")


def test_a_class_that_is_not_there_is_refused():
    trial = try_architecture(Architecture("llama", "NoSuchClass"))
    assert trial.status == "refused"
    assert "Cannot build a tiny model: AttributeError" in trial.reason


def test_a_refusal_of_ours_is_a_refusal(monkeypatch):
    text = "Memory cannot be attached to Llama: it is: odd. Supported are others"
    monkeypatch.setattr(trials, "MemoryDecoder", raising(UnsupportedModelError(text)))
    trial = try_architecture(LLAMA)
    assert (trial.status, trial.reason, trial.short_reason) == ("refused", text, "it is: odd")


def test_any_other_error_fails(monkeypatch):
    monkeypatch.setattr(trials, "MemoryDecoder", raising(ZeroDivisionError("by zero")))
    assert try_architecture(LLAMA).reason == "Attaching raises ZeroDivisionError: by zero"
    assert try_architecture(LLAMA).status == "fails"


def test_an_error_while_reading_fails(monkeypatch):
    monkeypatch.setattr(MemoryDecoder, "stream", raising(IndexError("out of range")))
    trial = try_architecture(LLAMA)
    assert trial.status == "fails"
    assert trial.reason == "With the whole text in the window, reading raises IndexError: out of range"


def test_a_memory_that_is_not_attended_to_fails(monkeypatch):
    forgetful = {**trials._WAYS, "all but the window in memory": trials.MemoryConfig(**SMALL, backend=None)}
    monkeypatch.setattr(trials, "_WAYS", forgetful)
    trial = try_architecture(LLAMA)
    assert trial.status == "fails"
    assert trial.reason.startswith("With all but the window in memory, logits are off by ")
    assert "the plain model's own" not in trial.reason


SMALL = {
    "local_window": 32,
    "chunk_size": 8,
    "segment_size": 16,
    "sink_tokens": 2,
    "position_mode": "original",
}


@pytest.mark.parametrize("wrong", [float("nan"), 1.0])
def test_a_plain_model_that_disagrees_with_itself_is_told(monkeypatch, wrong):
    def odd(architecture):
        model = tiny_model_of(architecture)

        def add(_, __, output):
            if output.logits.shape[1] > 100:
                output.logits = output.logits + wrong * torch.randn_like(output.logits)
            return output

        model.register_forward_hook(add)
        return model

    monkeypatch.setattr(trials, "tiny_model_of", odd)
    trial = try_architecture(LLAMA)
    assert trial.status == "fails"
    assert "(the plain model reading in pieces is off by" in trial.reason
