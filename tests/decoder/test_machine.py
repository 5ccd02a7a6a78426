"""Which device and dtype "auto" chooses; GPUs are pretended."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from memlong import MemoryDecoder, load_model
from memlong.decoder import choose_machine
from memlong.decoder.model import machine
from memlong.errors import DeviceUnavailableError, InvalidArgumentError
from memlong.testing import tiny_model

TRAINED = ("float32", "there")


@pytest.fixture
def tokenizer():
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    )


@pytest.fixture
def cpu(monkeypatch):
    """A machine without a GPU, whose CPU multiplies so many times as fast in bfloat16."""

    def pretend(speedup: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(machine, "bfloat16_speedup", lambda: speedup)

    pretend(2.0)
    return pretend


@pytest.fixture
def gpu(monkeypatch, cpu):
    """A machine with a GPU, which fails in some dtypes."""

    def pretend(kind: str, *, fails: tuple[str, ...] = (), capability: tuple[int, int] = (9, 0)) -> None:
        backend = torch.cuda if kind == "cuda" else torch.backends.mps
        monkeypatch.setattr(backend, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        compute = machine._exercise

        def exercise(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
            if device.type != "cpu" and machine.dtype_name(dtype) in fails:
                raise NotImplementedError("'aten::topk' is not implemented\nhere")
            return compute(torch.device("cpu"), dtype)

        monkeypatch.setattr(machine, "_exercise", exercise)

    return pretend


@pytest.mark.parametrize(
    ("speedup", "dtype", "why"),
    [
        (2.0, torch.bfloat16, "2.0 times as fast in bfloat16"),
        (0.2, torch.float32, "5.0 times as fast in float32"),
        (1.05, torch.float32, "no faster in bfloat16"),
        (0.0, torch.float32, "no faster in bfloat16"),  # no such product at all
    ],
)
def test_a_cpu_gets_the_dtype_that_it_computes_faster(cpu, speedup, dtype, why):
    cpu(speedup)
    found = choose_machine()
    assert (found.device, found.dtype) == (torch.device("cpu"), dtype)
    assert why in found.why
    assert "\n" not in str(found)


def test_cuda_comes_before_mps_and_both_before_the_cpu(gpu):
    gpu("mps")
    assert choose_machine().device.type == "mps"
    gpu("cuda")
    assert choose_machine().device.type == "cuda"


@pytest.mark.parametrize(
    ("capability", "trains", "dtype"),
    [
        ((9, 0), False, torch.bfloat16),
        ((8, 0), False, torch.bfloat16),
        ((7, 5), False, torch.float16),
        ((7, 5), True, torch.float32),  # small gradients vanish in float16
    ],
)
def test_cuda_gets_bfloat16_where_it_is_native(gpu, capability, trains, dtype):
    gpu("cuda", capability=capability)
    assert choose_machine(trains=trains).dtype == dtype


def test_mps_gets_the_sixteen_bits_that_work(gpu):
    gpu("mps")
    assert choose_machine().dtype == torch.bfloat16
    gpu("mps", fails=("bfloat16",))
    assert choose_machine().dtype == torch.float16


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_gpu_that_cannot_compute_what_is_needed_is_passed_over_and_named(gpu, kind):
    gpu(kind, fails=("bfloat16", "float16"))
    found = choose_machine()
    assert found.device.type == "cpu"
    assert kind.upper() in found.passed_over
    assert "aten::topk" in found.passed_over
    assert "\n" not in str(found)
    with pytest.raises(DeviceUnavailableError, match="aten::topk"):
        choose_machine(device=kind)


def test_a_gpu_with_wrong_results_is_passed_over(gpu, monkeypatch):
    gpu("mps")
    compute = machine._exercise
    monkeypatch.setattr(
        machine,
        "_exercise",
        lambda device, dtype: compute(device, dtype) * (2 if device.type == "mps" else 1),
    )
    found = choose_machine()
    assert found.device.type == "cpu"
    assert "wrong results" in found.passed_over


def test_what_is_named_is_taken(gpu, monkeypatch):
    gpu("cuda")
    monkeypatch.setattr(machine, "bfloat16_speedup", lambda: pytest.fail("nothing to measure"))
    found = choose_machine("float16", "cpu")
    assert (found.device, found.dtype, found.why) == (torch.device("cpu"), torch.float16, "as asked")
    assert choose_machine("float32").device.type == "cuda"


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"dtype": "int8"}, InvalidArgumentError, "dtype must be one of float32, .*, got 'int8'"),
        ({"device": "meta"}, InvalidArgumentError, "device must be 'cpu', .*, got 'meta'"),
        ({"device": "gpu"}, InvalidArgumentError, "device must be 'cpu', .*, got 'gpu'"),
        ({"device": "cuda:7"}, DeviceUnavailableError, "CUDA devices here"),
        ({"device": "mps"}, DeviceUnavailableError, "no Metal GPU"),
    ],
)
def test_what_cannot_be_is_named(cpu, asked, error, message):
    with pytest.raises(error, match=message):
        choose_machine(**asked)


def test_the_dtype_of_a_training_goes_before_what_is_fast_and_says_so(cpu):
    found = choose_machine(trained=TRAINED)
    assert found.dtype == torch.float32
    assert found.why.startswith("as there was trained, but this CPU multiplies 2.0 times")
    assert "--dtype bfloat16" in found.why
    cpu(0.5)
    assert choose_machine(trained=TRAINED).why == "as there was trained"
    assert choose_machine("bfloat16", trained=TRAINED).dtype == torch.bfloat16


def test_the_measurement_is_made_once_and_leaves_no_trace(monkeypatch):
    made = []
    plain = machine.linear
    monkeypatch.setattr(machine, "linear", lambda *given: made.append(given) or plain(*given))
    machine._measured_speedup.cache_clear()
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            first = machine.bfloat16_speedup()
    finally:
        torch.set_default_dtype(torch.float32)
    count = len(made)
    assert first > 0
    assert {rows.dtype for rows, _ in made} == {torch.float32, torch.bfloat16}
    assert machine.bfloat16_speedup() == first
    assert len(made) == count
    assert torch.equal(torch.get_rng_state(), before)


def test_a_build_without_such_a_product_has_no_speedup(monkeypatch):
    def fail(*_):
        raise RuntimeError("no bfloat16 here")

    monkeypatch.setattr(machine, "linear", fail)
    machine._measured_speedup.cache_clear()
    try:
        assert machine.bfloat16_speedup() == 0.0
    finally:
        machine._measured_speedup.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_exercise_is_one_that_a_cpu_passes_in_every_dtype(dtype):
    cpu = torch.device("cpu")
    assert torch.allclose(
        machine._exercise(cpu, dtype), machine._exercise(cpu, torch.float32), rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize(("speedup", "dtype"), [(2.0, torch.bfloat16), (0.2, torch.float32)])
def test_models_are_loaded_in_it_whatever_their_file_holds(cpu, tmp_path, speedup, dtype, tokenizer):
    tiny_model().half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    cpu(speedup)
    model, _ = load_model(str(tmp_path))
    assert (model.dtype, model.device.type) == (dtype, "cpu")


def test_a_trained_decoder_is_loaded_in_the_dtype_of_its_training(cpu, tmp_path, tokenizer, small):
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    tokenizer.save_pretrained(base)
    for speedup, dtype in ((0.5, "bfloat16"), (2.0, "float32")):
        folder = tmp_path / dtype
        model, _ = load_model(str(base), dtype=dtype)
        MemoryDecoder(model, None, small(gate_init=-1.0)).save_pretrained(folder)
        cpu(speedup)
        loaded = MemoryDecoder.from_pretrained(folder)
        assert machine.dtype_name(loaded.model.dtype) == dtype
        other = MemoryDecoder.from_pretrained(folder, dtype="float16")
        assert other.model.dtype == torch.float16
