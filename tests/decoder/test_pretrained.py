"""A trained decoder, saved and loaded again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from memlong import MemoryDecoder, load_model
from memlong.errors import InvalidArgumentError, StorageError
from memlong.training import Trainer, TrainingConfig, fit_latent_maps

CONFIG = {"rows": 1, "document_tokens": 64, "lora_rank": 4, "lr": 0.02, "gate_lr": 0.5, "warmup_steps": 0}


def read(decoder, ids):
    with decoder:
        decoder.reset()
        return torch.cat([segment.logits for segment in decoder.stream(ids)], dim=1)


@pytest.fixture
def base(llama, tmp_path):
    folder = tmp_path / "base"
    llama.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(number): number for number in range(97)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


@pytest.fixture
def trained(base, small, text, tmp_path):
    """A folder of a decoder with adapter, maps and gates, trained for four steps, and the decoder itself."""

    def make(dtype="float32", folder="out", **changes):
        model, tokenizer = load_model(str(base), dtype=dtype)
        settings = {"kv_source": "latent", "retrieval_layers": "2-3", "gate_init": -1.0, **changes}
        if settings["kv_source"] == "latent":
            maps = fit_latent_maps(model, [text(200)], dim=32, layers="2-3").to(dtype=model.dtype)
            maps.save(tmp_path / "fitted.safetensors")
            settings["maps"] = str(tmp_path / "fitted.safetensors")
        decoder = MemoryDecoder(model, tokenizer, small(**settings))
        config = TrainingConfig(steps=4, **CONFIG)
        Trainer(decoder, [text(64)[0]] * 2, config, folder=tmp_path / folder, base_model=str(base)).run()
        return tmp_path / folder, decoder

    return make


FRESH = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from memlong import MemoryDecoder
file, threads, folders = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(threads)
ids = load_file(file)["ids"]
found = {}
for folder, dtype in folders.items():
    with MemoryDecoder.from_pretrained(folder, dtype=dtype) as decoder:
        found[folder] = torch.cat([segment.logits for segment in decoder.stream(ids)], dim=1)
save_file(found, file)
"""


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_logits(trained, text, tmp_path):
    ids, expected, dtypes = text(100, seed=5), {}, {}
    for dtype in ("float32", "bfloat16"):
        for source in ("latent", "shared"):
            folder, decoder = trained(dtype, folder=f"{dtype}-{source}", kv_source=source)
            expected[str(folder)], dtypes[str(folder)] = read(decoder, ids), dtype
    (tmp_path / "fitted.safetensors").unlink()  # the folders have maps of their own
    file = tmp_path / "found.safetensors"
    save_file({"ids": ids}, file)
    command = [sys.executable, "-c", FRESH, file, str(torch.get_num_threads()), json.dumps(dtypes)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    found = load_file(file)
    assert found.keys() == expected.keys()
    for folder, logits in expected.items():
        torch.testing.assert_close(
            found[folder], logits, rtol=0.0, atol=1e-6, msg=lambda said, name=folder: f"{name}: {said}"
        )


def test_the_training_made_a_difference(trained, base, text):
    _, decoder = trained()
    assert not torch.allclose(
        read(decoder, text(100)),
        read(MemoryDecoder(load_model(str(base), dtype="float32")[0], None, decoder.config), text(100)),
    )
    assert float((decoder.gates.bias + 1).abs().max()) > 0.1


def test_the_folder_says_what_it_is(trained, base):
    folder, _ = trained()
    names = {file.name for file in folder.iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "maps.safetensors",
        "gates.safetensors",
    } <= names
    facts = json.loads((folder / "memlong.json").read_text())
    assert facts["base_model"] == str(base)
    assert facts["memory"]["retrieval_layers"] == "2-3"
    assert facts["training"]["steps"] == 4
    assert {"memlong", "torch", "transformers", "peft"} <= set(facts["versions"])
    assert str(folder) not in (folder / "memlong.json").read_text()


def test_a_model_at_hand_gets_the_adapter(trained, base, text):
    folder, decoder = trained(kv_source="shared")
    model, tokenizer = load_model(str(base), dtype="float32")
    found = MemoryDecoder.from_pretrained(folder, model, tokenizer)
    torch.testing.assert_close(read(found, text(100)), read(decoder, text(100)), rtol=0.0, atol=1e-6)
    with pytest.raises(InvalidArgumentError, match="has an adapter already"):
        MemoryDecoder.from_pretrained(folder, model, tokenizer)


def test_the_path_of_a_demo_model_is_not_written(trained, base, tmp_path):
    folder, decoder = trained()
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    decoder.model.memlong_name = "demo"  # as load_model notes it
    decoder.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert again["base_model_name_or_path"] is None
    assert again["r"] == settings["r"]


def test_saved_again_it_is_the_same(trained, text, tmp_path):
    folder, decoder = trained()
    MemoryDecoder.from_pretrained(folder, dtype="float32").save_pretrained(tmp_path / "again")
    again = MemoryDecoder.from_pretrained(tmp_path / "again", dtype="float32")
    torch.testing.assert_close(read(again, text(100)), read(decoder, text(100)), rtol=0.0, atol=1e-6)


def test_an_untrained_decoder_is_saved_without_an_adapter(base, small, text, tmp_path):
    model, tokenizer = load_model(str(base), dtype="float32")
    decoder = MemoryDecoder(model, tokenizer, small(gate_init=0.5))
    decoder.save_pretrained(tmp_path / "plain")
    assert {file.name for file in (tmp_path / "plain").iterdir()} == {"memlong.json", "gates.safetensors"}
    again = MemoryDecoder.from_pretrained(tmp_path / "plain", dtype="float32")
    torch.testing.assert_close(read(again, text(60)), read(decoder, text(60)), rtol=0.0, atol=1e-6)


def test_retriever_backend_and_store_can_be_others(trained, text):
    folder, decoder = trained(kv_source="shared")
    changes = {
        "retriever": "random",
        "retriever_options": {"seed": 3},
        "backend": "faiss",
        "store": {"host": "1MB"},
    }
    found = MemoryDecoder.from_pretrained(folder, changes=changes, dtype="float32")
    assert (found.config.retriever, found.config.backend) == ("random", "faiss")
    assert not torch.allclose(read(found, text(100)), read(decoder, text(100)))
    fewer = MemoryDecoder.from_pretrained(
        folder, changes={"top_k": 1, "retrieve_for": "answers", "answer_cutoff": 0.5}, dtype="float32"
    )
    assert (fewer.config.top_k, fewer.config.retrieve_for, fewer.config.answer_cutoff) == (1, "answers", 0.5)
    plain = MemoryDecoder.from_pretrained(folder, changes={"backend": None}, dtype="float32")
    assert not torch.allclose(read(plain, text(100)), read(decoder, text(100)))


def rewrite(folder, **changes):
    facts = json.loads((folder / "memlong.json").read_text())
    (folder / "memlong.json").write_text(json.dumps({**facts, **changes}))


def test_what_cannot_be_loaded_is_said(trained, tiny_model, tmp_path):
    folder, _ = trained(kv_source="shared")

    def fails(words, error=InvalidArgumentError, **options):
        with pytest.raises(error, match=words):
            MemoryDecoder.from_pretrained(options.pop("name", folder), dtype="float32", **options)

    fails("holds no memlong.json", name=tmp_path)
    fails("is a file; name the folder", name=folder / "memlong.json")
    fails("not a folder here, and cannot be downloaded from the hub", name="no/such/folder")
    fails("changes must be among .*, got 'chunk_size'", changes={"chunk_size": 2})
    wide = tiny_model("Qwen3")
    fails("Use the model that it was trained", model=wide)
    rewrite(folder, base_model=None)
    fails("does not say for which model")
    rewrite(folder, base_model="no/such/model")
    fails("'no/such/model' could not be loaded")
    whole = (folder / "memlong.json").read_text()
    rewrite(folder, memory={"speed": 9})
    fails("cannot be read as a decoder's settings")
    rewrite(folder, format="memlong-decoder-9")
    fails("got 'memlong-decoder-9'")
    (folder / "memlong.json").write_text(whole[:50])
    fails("cannot be read as a decoder's settings")


def test_a_damaged_adapter_is_said(trained):
    folder, _ = trained(kv_source="shared")
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidArgumentError, match="could not be loaded into this LlamaForCausalLM"):
        MemoryDecoder.from_pretrained(folder, dtype="float32")
    tensors = load_file_of(whole, weights)
    tensors.popitem()
    save_file(tensors, weights)
    with pytest.raises(InvalidArgumentError, match="1 of its tensors are missing"):
        MemoryDecoder.from_pretrained(folder, dtype="float32")
    weights.unlink()
    with pytest.raises(InvalidArgumentError, match=r"holds no adapter_model\.safetensors"):
        MemoryDecoder.from_pretrained(folder, dtype="float32")


def load_file_of(data, path):
    path.write_bytes(data)
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def test_a_folder_that_cannot_be_written_is_said(llama, small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written to"):
        MemoryDecoder(llama, None, small()).save_pretrained(tmp_path / "file" / "folder")


def test_an_adapter_is_refused_on_other_weights_and_leaves_the_model_alone(trained, base, text):
    folder, _ = trained(kv_source="shared")
    model, tokenizer = load_model(str(base), dtype="bfloat16")
    assert MemoryDecoder.from_pretrained(folder, model, tokenizer)  # of another precision, the same
    model, tokenizer = load_model(str(base), dtype="float32")
    names = dict(model.named_parameters())
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    with pytest.raises(InvalidArgumentError, match="was trained for other weights"):
        MemoryDecoder.from_pretrained(folder, model, tokenizer)
    rewrite(folder, base_weights=None)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InvalidArgumentError, match="1 of its tensors are missing"):
        MemoryDecoder.from_pretrained(folder, model, tokenizer)
    after = dict(model.named_parameters())
    assert after.keys() == names.keys()
    assert all(after[name] is names[name] and names[name].requires_grad for name in names)
    assert not getattr(model, "peft_config", None)


def test_a_model_is_saved_under_the_name_it_was_loaded_by(base, small, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    model, tokenizer = load_model(base.name, dtype="float32")
    MemoryDecoder(model, tokenizer, small()).save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "memlong.json").read_text())["base_model"] == str(base)
    changed = MemoryDecoder.from_pretrained(tmp_path / "plain", changes={"retriever": "random"})
    assert changed.config.retriever == "random"
    with pytest.raises(InvalidArgumentError):
        MemoryDecoder.from_pretrained("x" * 300)


def test_a_full_disk_leaves_the_decoder_that_was_there(trained, text, monkeypatch):
    folder, decoder = trained(kv_source="shared")
    said = read(decoder, text(60))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        for name, parameter in decoder.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("memlong.decoder.model.gates.MemoryGates.save", full)
        with pytest.raises(StorageError, match=r"cannot be written to .*No space left"):
            decoder.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    again = MemoryDecoder.from_pretrained(folder, dtype="float32")
    torch.testing.assert_close(read(again, text(60)), said, rtol=0.0, atol=1e-6)
    decoder.save_pretrained(folder, base_model=again.model.memlong_name)
    again = MemoryDecoder.from_pretrained(folder, dtype="float32")
    torch.testing.assert_close(read(again, text(60)), read(decoder, text(60)), rtol=0.0, atol=1e-6)


def test_no_adapter_is_put_into_the_folder_of_a_model(trained, base):
    _, decoder = trained(kv_source="shared")
    before = sorted(base.iterdir())
    with pytest.raises(InvalidArgumentError, match="holds a model, which would be loaded with this adapter"):
        decoder.save_pretrained(base)
    assert sorted(base.iterdir()) == before
