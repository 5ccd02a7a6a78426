"""What is secret in a backend's name or options stays in the config, and goes into no file and no report."""

import sys
import types
from dataclasses import replace

import pytest
import torch

from memlong import MemoryConfig, MemoryDecoder, Registry, hookimpl
from memlong.decoder.retrievers.lm import LanguageModelRetriever
from memlong.errors import InvalidArgumentError


class Paid(LanguageModelRetriever):
    """A retriever of a plugin, which asks a service."""

    def __init__(self, model, tokenizer, *, api_key="", style=""):
        super().__init__(model, tokenizer, dim=64)


class Plugin:
    @hookimpl
    def memlong_register_retrievers(self, register):
        register("paid", "fake_paid:Paid")


@pytest.fixture
def registry(monkeypatch):
    module = types.ModuleType("fake_paid")
    module.Paid = Paid
    monkeypatch.setitem(sys.modules, "fake_paid", module)
    found = Registry()
    found.manager.register(Plugin(), name="paid")
    return found


def test_no_secret_is_saved_and_a_new_one_reads_what_was(tiny_model, small, registry, tmp_path):
    def config(key):
        return small(retriever="paid", retriever_options={"api_key": key})

    model = tiny_model()
    with MemoryDecoder(model, None, config("sk-SECRET"), registry=registry) as decoder:
        decoder.read(torch.randint(3, 97, (1, 80)))
        decoder.save(tmp_path / "saved")
        decoder.save_pretrained(tmp_path / "trained")
    for file in tmp_path.rglob("*.json"):
        assert "SECRET" not in file.read_text()
    loaded = MemoryDecoder.load(tmp_path / "saved", model, None, config("sk-ROTATED"), registry=registry)
    assert loaded.tokens_read == (80,)
    with pytest.raises(InvalidArgumentError, match=r"hides the option 'api_key'.*give it yourself"):
        MemoryDecoder.from_pretrained(tmp_path / "trained", model, None, registry=registry)
    changes = {"retriever_options": {"api_key": "sk-ROTATED"}}
    assert MemoryDecoder.from_pretrained(
        tmp_path / "trained", model, None, changes=changes, registry=registry
    )


def test_an_error_about_options_shows_none():
    with pytest.raises(
        InvalidArgumentError, match=r"backend_options must be a mapping .*, got a str"
    ) as caught:
        MemoryConfig(backend_options="token=secret")
    assert "secret" not in str(caught.value)


def test_settings_are_given_without_credentials():
    config = MemoryConfig(backend="db://me:secret@host/x", backend_options={"token": "secret", "ef": 9})
    shown = config.as_dict()
    assert shown["backend"] == "db://***@host/x"
    assert shown["backend_options"] == {"token": "***", "ef": 9}
    assert "secret" not in str(shown)
    assert "secret" not in repr(config)
    assert config.backend_options == {"token": "secret", "ef": 9}


def test_a_decoder_shows_no_secret(tiny_model, small):
    decoder = MemoryDecoder(tiny_model(), None, small())
    decoder.config = replace(decoder.config, backend="db://me:secret@host/x")
    assert "secret" not in repr(decoder)
    assert "db://***@host/x" in repr(decoder)
