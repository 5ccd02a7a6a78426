"""Loading a model: quiet, and nothing of the process is changed for good."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, modeling_gguf_pytorch_utils
from transformers.utils import logging

from memlong import MemoryDecoder, load_model
from memlong.decoder.model.quiet_loading import quiet_loading
from memlong.errors import InvalidArgumentError, MissingDependencyError


def test_threads_that_load_leave_stderr_and_the_settings_as_they_were(monkeypatch):
    before = sys.stderr, logging.get_verbosity(), logging.is_progress_bar_enabled()
    calls: list[bool] = []
    second, first_done = threading.Event(), threading.Event()

    def fail(*_, **__):
        calls.append(sys.stderr is before[0])
        if len(calls) == 1:
            second.wait(1)
        else:
            second.set()
            first_done.wait(1)
        raise OSError("nothing there")

    def load():
        with pytest.raises(InvalidArgumentError, match="nothing there"):
            load_model("tiny")
        first_done.set()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [True, True]  # while a model loads, others can write to stderr
    assert (sys.stderr, logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_no_bar_of_transformers_shows_while_loading(capsys, monkeypatch):
    # As in a process that has read no GGUF file yet: transformers does not offer the module by itself.
    monkeypatch.delattr(transformers, "modeling_gguf_pytorch_utils", raising=False)
    with quiet_loading():
        for bar in (logging.tqdm, modeling_gguf_pytorch_utils.tqdm):
            assert list(bar(range(3), desc="Loading weights")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    list(modeling_gguf_pytorch_utils.tqdm(range(3), desc="own again"))
    assert "own again" in capsys.readouterr().err


def save_tokenizer(folder):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


@pytest.fixture
def folder(llama, tmp_path):
    """A folder that transformers saved."""
    llama.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def configured(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own-llama"
"""
MODEL = """
import pathlib
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

pathlib.Path(__file__).with_name("ran").touch()

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(folder, tmp_path, monkeypatch):
    """A folder of a model that transformers does not know, with the code for it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODEL)
    auto = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    return configured(folder, model_type="own-llama", auto_map=auto)


def test_code_of_a_models_own_runs_only_where_it_is_trusted(
    own_code, llama, small, text, tmp_path, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the console"))
    with pytest.raises(
        InvalidArgumentError, match=r"Python code of its own.*rights.*trust_remote_code=True"
    ) as caught:
        load_model(own_code)
    assert "--trust-remote-code" in str(caught.value)
    assert not list(tmp_path.rglob("ran"))
    model, tokenizer = load_model(own_code, dtype="float32", trust_remote_code=True)
    assert list(tmp_path.rglob("ran"))
    assert type(model).__name__ == "OwnForCausalLM"
    ids = text(90)
    found = []
    for each in (model, llama):
        with MemoryDecoder(each, tokenizer, small()) as decoder:
            found.append(decoder.read(ids))
    assert torch.equal(*found)


def test_a_trained_decoder_asks_for_trust_in_its_models_code(own_code, small, tmp_path):
    model, tokenizer = load_model(own_code, dtype="float32", trust_remote_code=True)
    MemoryDecoder(model, tokenizer, small()).save_pretrained(tmp_path / "trained")
    with pytest.raises(InvalidArgumentError, match="trust_remote_code=True"):
        MemoryDecoder.from_pretrained(tmp_path / "trained")
    assert MemoryDecoder.from_pretrained(tmp_path / "trained", trust_remote_code=True)


def test_code_that_lacks_a_package_names_it(own_code):
    path = own_code / "modeling_own.py"
    path.write_text("import a_package_that_nobody_has\n" + path.read_text())
    with pytest.raises(MissingDependencyError, match="a_package_that_nobody_has"):
        load_model(own_code, trust_remote_code=True)


def test_code_that_fails_is_told_as_the_models(own_code):
    (own_code / "modeling_own.py").write_text("raise ZeroDivisionError('its own')")
    with pytest.raises(InvalidArgumentError, match=r"could not be loaded: ZeroDivisionError\('its own'\)"):
        load_model(own_code, trust_remote_code=True)


@pytest.mark.parametrize(
    ("quantization", "command"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "pip install accelerate bitsandbytes"),
        ({"load_in_8bit": True}, "pip install accelerate bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "pip install accelerate gptqmodel optimum"),
        ({"quant_method": "awq", "bits": 4}, "pip install accelerate gptqmodel"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
            "pip install accelerate compressed-tensors",
        ),
        (
            {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}},
            },
            "pip install accelerate torchao",
        ),
        ({"quant_method": "hqq"}, "pip install accelerate hqq"),
        ({"quant_method": "quanto", "weights": "int8"}, "pip install accelerate optimum-quanto"),
    ],
)
def test_what_reads_a_quantization_is_named_where_it_is_missing(folder, quantization, command):
    package = command.rpartition(" ")[2].replace("-", "_")
    if importlib.util.find_spec({"optimum_quanto": "optimum"}.get(package, package)):
        pytest.skip(f"{package} is installed")
    with pytest.raises(MissingDependencyError, match="is quantized by") as caught:
        load_model(configured(folder, quantization_config=quantization), device="cpu")
    assert f"{command}\n" in str(caught.value)


def test_a_quantization_that_transformers_does_not_know_is_not_passed_over(folder):
    with pytest.raises(InvalidArgumentError, match="quantized by 'of-tomorrow', which this release"):
        load_model(configured(folder, quantization_config={"quant_method": "of-tomorrow"}))


def test_a_multimodal_model_that_is_no_causal_one_loads(tmp_path):
    text = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 512, "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **vision},
        image_token_index=96,
    )
    assert type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    model, _ = load_model(tmp_path, dtype="float32")
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert not model.training


def test_a_model_that_generates_no_text_is_refused_as_such(tmp_path):
    transformers.T5Config().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(InvalidArgumentError, match="no model of the type 't5' that generates text"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_hidden_layers", 5, r"9 of its weights are not in its files, .* such as model\.layers\.4"),
        (
            "intermediate_size",
            60,
            r"12 of its weights .* of another shape there, such as model\.layers\.0\.mlp",
        ),
    ],
)
def test_weights_that_are_missing_are_not_made_up(folder, field, value, said):
    with pytest.raises(InvalidArgumentError, match=said):
        load_model(configured(folder, **{field: value}))


def test_a_class_that_does_not_find_the_weights_gives_way_to_the_next(tmp_path):
    text = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 512, "pad_token_id": 0}
    tower = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": []}
    config = transformers.Emu3Config(
        text_config=text,
        vq_config={**tower, "hidden_size": 32, "num_attention_heads": 1},
        vocabulary_map={"<image>": 5},
    )
    transformers.Emu3ForConditionalGeneration(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert type(load_model(tmp_path)[0]).__name__ == "Emu3ForConditionalGeneration"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "name must be a hub id, .*, got None"),
        ({"device": None}, "device must be 'cpu', .*, got None"),
        ({"device": 1.5}, r"device must be 'cpu', .*, got 1\.5"),
        ({"dtype": None}, "dtype must be one of float32, .*, got None"),
        ({"dtype": torch.int8}, "dtype must be one of float32, .*, got 'int8'"),
    ],
)
def test_what_is_no_name_is_refused_as_any_wrong_name(folder, changes, message):
    given = {"name": folder, **changes}
    with pytest.raises(InvalidArgumentError, match=message):
        load_model(given.pop("name"), **given)


@pytest.mark.slow
def test_a_command_runs_code_only_where_it_is_told_to(own_code, tmp_path):
    (tmp_path / "book.txt").write_text("a b " * 400)
    command = [
        sys.executable,
        "-c",
        "from memlong.cli import main; main()",
        "perplexity",
        "--model",
        str(own_code),
    ]
    command += ["--text", str(tmp_path / "book.txt"), "--dtype", "float32", "--local-window", "128"]
    command += ["--segment-size", "32", "--chunk-size", "16", "--max-tokens", "300"]
    modules = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    said = subprocess.run(command, capture_output=True, text=True, env=modules, stdin=subprocess.DEVNULL)
    assert said.returncode == 1
    assert "memlong: The model" in said.stderr
    assert "--trust-remote-code" in said.stderr
    assert "Traceback" not in said.stderr
    said = subprocess.run(
        [*command, "--trust-remote-code"],
        capture_output=True,
        text=True,
        env=modules,
        stdin=subprocess.DEVNULL,
    )
    assert said.returncode == 0, said.stderr
