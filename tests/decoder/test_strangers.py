"""The folder of a trained decoder may be a stranger's: what it may not choose, and what it may not cost."""

from __future__ import annotations

import json
import os
import socket
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from memlong import MemoryDecoder
from memlong.bank.snapshot.manifest import _dumped
from memlong.errors import InvalidArgumentError, MemlongError

peft = pytest.importorskip("peft")


@pytest.fixture
def folder(tiny_model, small, tmp_path):
    MemoryDecoder(tiny_model(), None, small()).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def remember(folder, **changes):
    facts = json.loads((folder / "memlong.json").read_text())
    facts["memory"] |= changes
    (folder / "memlong.json").write_text(json.dumps(facts))


def test_the_users_token_goes_to_no_host_of_an_adapter(folder, tiny_model, monkeypatch):
    monkeypatch.setenv("MEMLONG_MILVUS_TOKEN", "root:secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        place = f"127.0.0.1:{listener.getsockname()[1]}"
        remember(folder, backend=f"milvus://{place}?timeout=1&attempts=1")
        with pytest.raises(InvalidArgumentError, match=r"no file may choose.*changes=\{'backend'"):
            MemoryDecoder.from_pretrained(folder, tiny_model(), None)
        with pytest.raises(TimeoutError):
            listener.accept()
    assert MemoryDecoder.from_pretrained(folder, tiny_model(), None, changes={"backend": "torch"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"store": {"disk": "/victim"}}, "a place to write to"),
        ({"store": {"objects": "s3://victim"}}, "a place to write to"),
        ({"backend_options": {"uri": "http://stranger"}}, "names the option 'uri'"),
        (
            {"backend": "hnswlib", "backend_options": {"ef_construction": 2**20}},
            "more than a file may ask for",
        ),
        ({"backend": "hnswlib", "backend_options": {"M": [16]}}, "no text or number"),
        ({"retriever": "/usr"}, "a place on this machine"),
        ({"retriever": "../model"}, "a place on this machine"),
        ({"retriever": "stranger/model"}, r"a model to download.*changes=\{'retriever'"),
        *(
            ({"retriever": "sentence-transformers", "retriever_options": {"name": name}}, "the option 'name'")
            for name in ("//host/share", "stranger/model")
        ),
        ({"retriever": "random", "retriever_options": {"dim": 10**9}}, "more than a file may ask for"),
        ({"gates": "/etc/passwd"}, "must be the name of a file in the folder"),
        ({"gates": "../gates.safetensors"}, "must be the name of a file in the folder"),
        ({"gates": 3}, "cannot be read as a decoder's settings"),
        ({"retrieval_layers": "0-999999999"}, "the layers of this model"),
    ],
)
def test_a_folder_chooses_no_place_and_no_endless_effort(folder, tiny_model, changes, words):
    remember(folder, **changes)
    with pytest.raises(InvalidArgumentError, match=words):
        MemoryDecoder.from_pretrained(folder, tiny_model(), None)


@pytest.mark.parametrize("place", ["//host/share/model", r"\\host\share"])
def test_a_folder_names_no_model_on_another_host(folder, tiny_model, place):
    edit(folder / "memlong.json", base_model=place)
    with pytest.raises(InvalidArgumentError, match="a place on another host"):
        MemoryDecoder.from_pretrained(folder)
    assert MemoryDecoder.from_pretrained(folder, tiny_model(), None)


def test_options_of_a_retriever_choose_none(folder, tiny_model):
    remember(folder, retriever="stranger/model")
    with pytest.raises(InvalidArgumentError, match="a model to download"):
        MemoryDecoder.from_pretrained(folder, tiny_model(), None, changes={"retriever_options": {"dim": 8}})
    assert MemoryDecoder.from_pretrained(folder, tiny_model(), None, changes={"retriever": "recent"})


def test_what_does_no_harm_is_taken(folder, tiny_model):
    remember(
        folder, backend="hnswlib", backend_options={"M": 8, "max_chunks": 100}, retriever_options={"dim": 64}
    )
    config = MemoryDecoder.from_pretrained(folder, tiny_model(), None).config
    assert (config.backend_options["M"], config.retriever_options["dim"]) == (8, 64)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{" + " " * (5 << 20) + "}", "\0", "\ud800"])
def test_json_is_read_within_bounds(folder, tiny_model, content):
    (folder / "memlong.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(InvalidArgumentError, match="cannot be read as a decoder's settings"):
        MemoryDecoder.from_pretrained(folder, tiny_model(), None)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("name", ["memlong.json", "gates.safetensors"])
def test_a_special_file_blocks_nobody(folder, tiny_model, name):
    remember(folder, gates="gates.safetensors")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(InvalidArgumentError, match="is not a regular file"):
        MemoryDecoder.from_pretrained(folder, tiny_model(), None)


def test_a_folder_of_the_hubs_cache_is_loaded(adapter, tiny_model, tmp_path, text):
    folder, model = adapter()
    blobs, revision = (
        tmp_path / "models--a--b" / "blobs",
        tmp_path / "models--a--b" / "snapshots" / "revision",
    )
    blobs.mkdir(parents=True)
    revision.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        file.rename(blobs / str(number))
        (revision / file.name).symlink_to(f"../../blobs/{number}")
    loaded = MemoryDecoder.from_pretrained(revision, tiny_model(), None)
    torch.testing.assert_close(loaded.model(text(60)).logits, model(text(60)).logits)
    (revision / "adapter_config.json").unlink()
    (revision / "adapter_config.json").symlink_to("/etc/hostname")
    with pytest.raises(InvalidArgumentError, match="is a link, which could lead anywhere"):
        MemoryDecoder.from_pretrained(revision, tiny_model(), None)


@pytest.mark.parametrize("storing_from", [-(10**10), -1, 0, 2**62, 10**30])
def test_a_snapshot_of_streams_asks_for_no_endless_row_of_chunks(
    tiny_model, small, tmp_path, text, storing_from
):
    model = tiny_model()
    with MemoryDecoder(model, None, small()) as decoder:
        decoder.read(text(80))
        decoder.save(tmp_path)
    path = tmp_path / "manifest.json"
    data = json.loads(path.read_text())
    del data["sha256"]
    data["extra"]["facts"]["rows"][0]["storing_from"] = storing_from
    data["banks"][0]["next_id"] = 2**62
    path.write_bytes(_dumped(data))
    began = time.monotonic()
    try:
        with MemoryDecoder.load(tmp_path, model, None, small()) as decoder:
            decoder.read(text(40))
    except MemlongError:
        pass
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("model_type", ["evil", "llama"])
def test_code_of_a_base_model_is_neither_run_nor_asked_about(
    tiny_model, small, tmp_path, monkeypatch, model_type
):
    base, ran = tmp_path / "base", tmp_path / "ran"
    model = tiny_model()
    model.save_pretrained(base)
    words = Tokenizer(models.WordLevel({str(number): number for number in range(97)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(base)
    edit(
        base / "config.json",
        model_type=model_type,
        auto_map={"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.M"},
    )
    (base / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    MemoryDecoder(model, None, small()).save_pretrained(tmp_path / "plain", base_model=str(base))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    if model_type == "llama":  # transformers' own class reads it
        assert MemoryDecoder.from_pretrained(tmp_path / "plain")
    else:
        with pytest.raises(InvalidArgumentError, match="comes with Python code of its own"):
            MemoryDecoder.from_pretrained(tmp_path / "plain")
    assert not ran.exists()


@pytest.fixture
def adapter(tiny_model, small, tmp_path):
    def make(**changes):
        model = tiny_model()
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        MemoryDecoder(model, None, small()).save_pretrained(tmp_path / "adapter")
        edit(tmp_path / "adapter" / "adapter_config.json", **changes)
        return tmp_path / "adapter", model

    return make


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_lora_weights": "pissa"}, "changes the weights of the model itself"),
        ({"layer_replication": [[0, 4], [0, 4]]}, "layer_replication .* not taken from a file"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save .* not taken from a file"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config .* not taken from a file"),
        ({"peft_type": "PROMPT_TUNING"}, "'PROMPT_TUNING'"),
        ({"peft_type": ["LORA"]}, "of the kind"),
        ({"r": 10**6}, "its r is 1000000, but its tensors are of rank 4"),
        ({"lora_alpha": "x"}, "its lora_alpha must be a number, got 'x'"),
        ({"lora_alpha": 1e400}, "its lora_alpha must be a number, got inf"),
        ({"alpha_pattern": {"(([a-z_.0-9]+)*)*X": 3}}, "without patterns"),
        ({"bias": "all"}, "its bias must be 'none', got 'all'"),
        ({"use_dora": "yes"}, "its use_dora must be true or false, got 'yes'"),
    ],
)
def test_a_refused_adapter_leaves_the_model_as_it_was(adapter, tiny_model, changes, words):
    folder, _ = adapter(**changes)
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(InvalidArgumentError, match=words):
        MemoryDecoder.from_pretrained(folder, model, None)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert modules == {name: type(module) for name, module in model.named_modules()}


def test_a_pattern_of_a_stranger_is_never_run(adapter, tiny_model, text):
    folder, model = adapter(target_modules="(([a-z_.0-9]+)*)*X", rank_pattern={"(([a-z_.0-9]+)*)*X": 3})
    began = time.monotonic()
    loaded = MemoryDecoder.from_pretrained(folder, tiny_model(), None)
    assert time.monotonic() - began < 5
    ids = text(60)
    torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits)


def test_ranks_and_alphas_of_layers_are_kept(tiny_model, small, tmp_path, text):
    model = tiny_model()
    lora = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 32}, "init_lora_weights": False}
    model.add_adapter(peft.LoraConfig(r=4, target_modules=r".*\.(q|v)_proj", **lora))
    MemoryDecoder(model, None, small()).save_pretrained(tmp_path)
    loaded = MemoryDecoder.from_pretrained(tmp_path, tiny_model(), None)
    torch.testing.assert_close(loaded.model(text(60)).logits, model(text(60)).logits)


def test_tensors_beyond_the_model_are_not_read(adapter, tiny_model):
    folder, _ = adapter(r=10**6)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = min(each for each in tensors if "lora_A" in each)
    save_file({name: torch.empty(10**6, tensors[name].shape[1])}, folder / "adapter_model.safetensors")
    with pytest.raises(
        InvalidArgumentError, match=r"its 1 tensors must have 1 to .* numbers, got 48,000,000"
    ):
        MemoryDecoder.from_pretrained(folder, tiny_model(), None)
    save_file({"base_model.model.x.lora_A.weight": torch.ones(4, 4)}, folder / "adapter_model.safetensors")
    with pytest.raises(InvalidArgumentError, match="belongs to no layer of the model"):
        MemoryDecoder.from_pretrained(folder, tiny_model(), None)


def test_what_could_not_be_loaded_is_not_saved(tiny_model, small, tmp_path):
    model = tiny_model()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(InvalidArgumentError, match=r"could not be loaded again .* modules_to_save"):
        MemoryDecoder(model, None, small()).save_pretrained(tmp_path)


def test_an_interrupt_leaves_no_adapter(adapter, tiny_model, monkeypatch):
    folder, _ = adapter()
    model = tiny_model()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("memlong.decoder.persistence.adapter_files._check_loaded", interrupt)
    with pytest.raises(KeyboardInterrupt):
        MemoryDecoder.from_pretrained(folder, model, None)
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    assert not getattr(model, "peft_config", None)
