"""What was made in one dtype, met by a model in another: used where that makes sense, refused by name elsewhere."""

from __future__ import annotations

import pytest
import torch

from memlong import MemoryDecoder, SnapshotError, load_bank
from memlong.errors import InvalidArgumentError
from memlong.testing import tiny_model
from memlong.training import Trainer, TrainingConfig, fit_latent_maps

DTYPES = ["float32", "bfloat16", "float16"]
PAIRS = [(saved, now) for saved in DTYPES for now in DTYPES if saved != now]


def model_in(dtype):
    return tiny_model().to(getattr(torch, dtype))


@pytest.fixture
def saved_in(small, text, tmp_path):
    """A folder of streams that a model in this dtype has read."""

    def save(dtype):
        with MemoryDecoder(model_in(dtype), None, small()) as decoder:
            decoder.read(text(80))
            decoder.save(tmp_path / "memory")
        return tmp_path / "memory"

    return save


@pytest.mark.parametrize(("saved", "now"), PAIRS)
def test_streams_of_another_dtype_are_refused_with_both_names_and_the_remedy(saved_in, small, saved, now):
    folder = saved_in(saved)
    with pytest.raises(SnapshotError) as caught:
        MemoryDecoder.load(folder, model_in(now), None, small())
    message = str(caught.value)
    assert f"what differs: dtype ({saved!r} when it was saved, {now!r} now)." in message
    assert f"load_model(..., dtype={saved!r}), or --dtype {saved}" in message
    assert "weights" not in message  # which nobody can compare


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_remedy_works(saved_in, small, text, dtype):
    folder = saved_in(dtype)
    with MemoryDecoder.load(folder, model_in(dtype), None, small()) as decoder:
        assert decoder.tokens_read == (80,)
        assert decoder.read(text(8)).isfinite().all()


def test_other_weights_in_another_dtype_are_refused_by_the_dtype_and_then_by_the_weights(saved_in, small):
    folder = saved_in("bfloat16")
    other = tiny_model("Llama", seed=1)
    with pytest.raises(SnapshotError, match=r"what differs: dtype \(.*\)\. Use"):
        MemoryDecoder.load(folder, other, None, small())
    with pytest.raises(SnapshotError, match=r"what differs: weights\. Use those, or any_model=True.*fit$"):
        MemoryDecoder.load(folder, other.bfloat16(), None, small())


@pytest.mark.parametrize(("saved", "now"), PAIRS)
def test_a_bank_of_another_dtype_is_refused_with_the_remedy(saved_in, small, saved, now):
    bank = load_bank(saved_in(saved))
    with (
        MemoryDecoder(model_in(now), None, small()) as decoder,
        pytest.raises(InvalidArgumentError, match=f"dtype torch.{now}, .*torch.{saved} .*--dtype {saved}"),
    ):
        decoder.reset(banks=[bank])


@pytest.mark.slow
@pytest.mark.parametrize("source", ["latent", "shared"])
@pytest.mark.parametrize(("trained", "used"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_what_was_trained_in_one_dtype_serves_in_the_other(small, text, tmp_path, source, trained, used):
    settings = {"kv_source": source, "retrieval_layers": "2-3", "gate_init": -1.0}
    model = model_in(trained)
    if source == "latent":
        fit_latent_maps(model_in("float32"), [text(200)], dim=32, layers="2-3").save(tmp_path / "maps")
        settings["maps"] = str(tmp_path / "maps")
    config = TrainingConfig(steps=2, rows=1, document_tokens=64, lora_rank=4, lr=0.02, warmup_steps=0)
    decoder = MemoryDecoder(model, None, small(**settings))
    Trainer(decoder, [text(64)[0]], config, folder=tmp_path / "out").run()

    def last(decoder):
        with decoder:
            decoder.reset()
            return decoder.read(text(70)).float()

    own, other = (
        last(MemoryDecoder.from_pretrained(tmp_path / "out", model_in(dtype))) for dtype in (trained, used)
    )
    plain = last(MemoryDecoder(model_in(used), None, small(backend=None)))
    assert (own - other).abs().max() < 0.1 * (own - plain).abs().max() + 0.05
    assert own.isfinite().all()
