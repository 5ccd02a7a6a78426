"""What a stranger's streams, maps or adapter claim costs no more than they are: bounded in time and memory."""

from __future__ import annotations

import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from memlong import MemoryDecoder
from memlong.bank.snapshot.manifest import _dumped
from memlong.errors import InvalidArgumentError, SnapshotError

peft = pytest.importorskip("peft")


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
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path / "adapter", model

    return make


@pytest.fixture
def streams(tiny_model, small, tmp_path, text):
    """A snapshot of streams, what its manifest says, and a way to sign another."""
    model = tiny_model()
    with MemoryDecoder(model, None, small()) as decoder:
        decoder.read(text(80))
        decoder.save(tmp_path / "streams")
    path = tmp_path / "streams" / "manifest.json"
    data = json.loads(path.read_text())
    del data["sha256"]
    return tmp_path / "streams", data, lambda: path.write_bytes(_dumped(data))


@pytest.mark.parametrize("adapters", [[1], "x", {"a": 3, "b": "x"}, {"a": {}}, {"a": None}])
@pytest.mark.parametrize("any_model", [False, True])
def test_a_fingerprint_may_say_anything_of_adapters(streams, tiny_model, small, adapters, any_model):
    folder, data, sign = streams
    data["extra"]["facts"]["fingerprint"]["adapters"] = adapters
    data["extra"]["facts"]["fingerprint"]["dtype"] = adapters
    sign()
    if any_model:
        assert MemoryDecoder.load(folder, tiny_model(), None, small(), any_model=True)
    else:
        with pytest.raises(SnapshotError, match="what differs: the form of the fingerprint"):
            MemoryDecoder.load(folder, tiny_model(), None, small())


def test_rows_that_are_not_there_cost_nothing(streams, tiny_model, small):
    folder, data, sign = streams
    data["extra"]["facts"]["rows"] *= 50_000
    sign()
    began = time.process_time()
    with pytest.raises(SnapshotError, match="50,000 rows are named, and not all are there"):
        MemoryDecoder.load(folder, tiny_model(), None, small(backend=None), any_model=True)
    assert time.process_time() - began < 3


def test_scales_of_other_shapes_make_no_large_maps(tiny_model, small, tmp_path):
    path = tmp_path / "maps.safetensors"
    count = 3000  # whose square is a gigabyte in larger files
    tensors = {name: torch.zeros(count, 1, dtype=torch.int8) for name in ("encode", "decode")}
    tensors |= {name: torch.ones(1, count) for name in ("encode_scale", "decode_scale", "mean")}
    save_file(tensors, path, metadata={"format": "memlong-latent-maps-2", "layers": "[0]"})
    with pytest.raises(InvalidArgumentError, match="its scales are not those of its steps"):
        MemoryDecoder(tiny_model(), None, small(kv_source="latent", maps=str(path)))


def test_alphas_are_those_of_the_first_name_that_fits_and_thousands_of_names_cost_little(
    adapter, tiny_model, text
):
    names = {f"n{number}": 1 for number in range(30_000)}
    folder, _ = adapter(alpha_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 32, **names})
    began = time.process_time()
    loaded = MemoryDecoder.from_pretrained(folder, tiny_model(), None)
    assert time.process_time() - began < 5
    scaling = {
        name: module.scaling["default"]
        for name, module in loaded.model.named_modules()
        if name.endswith(("q_proj", "v_proj"))
    }
    assert scaling["model.layers.1.self_attn.q_proj"] == 2 / 4
    assert scaling["model.layers.0.self_attn.q_proj"] == 32 / 4
    assert scaling["model.layers.0.self_attn.v_proj"] == 8 / 4
    loaded.save_pretrained(folder)  # and as often as one likes
    assert MemoryDecoder.from_pretrained(folder, tiny_model(), None)


def test_a_rank_beyond_the_model_is_refused_before_it_takes_memory(adapter, tiny_model):
    folder, _ = adapter(r=60_000)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {f"{name}A.weight": torch.zeros(60_000, 1), f"{name}B.weight": torch.zeros(1, 60_000)},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(InvalidArgumentError, match="its rank is 60,000, more than the 48 numbers"):
        MemoryDecoder.from_pretrained(folder, tiny_model(), None)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(adapter, tiny_model, number):
    folder, _ = adapter()
    tensors = load_file(folder / "adapter_model.safetensors")
    name = min(each for each in tensors if "lora_B" in each)
    tensors[name][0, 0] = number
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InvalidArgumentError, match=r"lora_B\.weight' holds numbers that are not finite"):
        MemoryDecoder.from_pretrained(folder, tiny_model(), None)


@pytest.mark.parametrize("name", ["gates.safetensors", "adapter_model.safetensors"])
def test_files_of_endless_tensors_are_not_read(adapter, tiny_model, name):
    folder, _ = adapter()
    if name == "gates.safetensors":
        facts = json.loads((folder / "memlong.json").read_text())
        facts["memory"]["gates"] = name
        (folder / "memlong.json").write_text(json.dumps(facts))
    text = b"{" + b" " * (9 << 20) + b"}"
    (folder / name).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InvalidArgumentError, match="describes more tensors than such a file ever holds"):
        MemoryDecoder.from_pretrained(folder, tiny_model(), None)
